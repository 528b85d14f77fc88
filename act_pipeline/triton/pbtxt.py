"""Protobuf's text format, as far as Triton's ``config.pbtxt`` needs it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Word(str):
    """A value without quotation marks: an enum's, such as ``KIND_CPU``."""


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message in the text format.

    Args:
        message: field -> value. A mapping is a message, a list of mappings or texts a repeated field, a list of numbers
            one line; None: the field is left out.
    """
    return "\n".join(_lines(message, "")) + "\n"


def entries(values: Mapping[str, Any], field: str = "") -> list[dict[str, Any]]:
    """Return a map field: a list of ``key`` and ``value``.

    Args:
        values: key -> value.
        field: field of the value's message that holds it, such as ``string_value``; empty: the value itself.
    """
    return [{"key": key, "value": {field: value} if field else value} for key, value in values.items()]


def _lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if value is None:
            continue
        numbers = isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
        for item in value if isinstance(value, (list, tuple)) and not numbers else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(item, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[ {', '.join(map(str, value))} ]"
    if isinstance(value, bool):
        return str(value).lower()
    # JSON's escapes are protobuf's too, but for \u, which ensure_ascii=False leaves out.
    return value if isinstance(value, Word) else json.dumps(value, ensure_ascii=False)
