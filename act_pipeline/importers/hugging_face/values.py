"""Reading of the values in the JSON files of ``transformers``, with one line for each that is not as expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number

VIA_ONNX = "export the model to ONNX, and import that with --onnx"
_MAX_COUNT = 1 << 16
_MAX_JSON_BYTES = 4 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {_MAX_JSON_BYTES >> 20} MiB, expected a config of transformers")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy the whole folder of the model") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected an object with model_type; download it again")
    return content


def require(section: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Check the keys that have one value in every model that can be imported.

    Args:
        section: an object of the file; a missing key has the expected value, the default of ``transformers``.
        fixed: key -> value.
        where: file and section, for messages.

    Raises:
        UserError: a value is another.
    """
    for key, expected in fixed.items():
        found = section.get(key, expected)
        same = found == expected and isinstance(found, bool) == isinstance(expected, bool)
        if not same and not (
            isinstance(found, float) and isinstance(expected, float) and math.isclose(found, expected)
        ):
            raise UserError(
                f"{where}: key '{key}' is {shown(found)}, expected {json.dumps(expected)}, as the published RT-DETR "
                f"have it; {VIA_ONNX}"
            )


def positive(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """Return a positive number of at most 100; a UserError names the file and the key where it is none."""
    value = as_number(config.get(key, default))
    if value is None or not 0 < value <= 100:
        raise UserError(f"{where}: key '{key}' is {shown(config[key])}, expected a number such as {default}")
    return value


def count(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """Return a positive integer; a UserError names the file and the key where it is none."""
    value = config.get(key, default)
    if not is_count(value):
        raise UserError(f"{where}: key '{key}' is {shown(value)}, expected an integer from 1 to {_MAX_COUNT}")
    return value


def int_list(config: Mapping[str, Any], key: str, default: list[int], where: str) -> list[int]:
    """Return a list of integers of at least 0; a UserError names the file and the key where it is none."""
    value = config.get(key, default)
    if not (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(item) is int and 0 <= item <= _MAX_COUNT for item in value)
    ):
        raise UserError(f"{where}: key '{key}' is {shown(value)}, expected a list of integers")
    return list(value)


def is_count(value: Any) -> bool:
    """Return whether a value is an integer from 1 to 65,536."""
    return type(value) is int and 1 <= value <= _MAX_COUNT


def shown(value: Any) -> str:
    """Return a JSON value for a message, cut to 80 characters."""
    if isinstance(value, (dict, list)) and len(value) > 6:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = json.dumps(value)
    except RecursionError:
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
