"""Dataclasses as the schema of a YAML file: :func:`build` checks keys, types and bounds.

A section of a config is a dataclass. The annotations and defaults of its fields are the types and defaults in YAML, and
:func:`key` adds bounds and names. Checks across fields raise :class:`Invalid` in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.yaml_files import Tagged, resolve_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")
_MISSING = dataclasses.MISSING
_SHOWN_CHOICES = 12
_TOO_WHOLE = 2**63  # integers in arrays and in Paddle are int64


class Invalid(ValueError):
    """A value that its dataclass refuses.

    Attributes:
        key: the key, possibly dotted; empty for the section itself.
        reason: the part of the message after the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} {reason}" if key else reason)
        self.key = key
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of values, for error messages and relative paths.

    Attributes:
        path: the YAML file.
        overridden: the dotted keys that were set on the command line with ``-o``.
    """

    path: Path
    overridden: tuple[str, ...] = ()

    def locate(self, name: str) -> str:
        """Return the start of an error message about the key ``name``: the file or ``-o``, and the key."""
        for key in self.overridden:
            if name == key or name.startswith((f"{key}.", f"{key}[")):
                return f"-o {name}"
            if name and key.startswith(f"{name}."):
                return f"-o {key}: {name}"
        return f"{self.path}: {name}" if name else str(self.path)


def key(
    default: Any = _MISSING,
    *,
    factory: Any = _MISSING,
    name: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    from_yaml: bool = True,
    rest: bool = False,
) -> Any:
    """Declare a field of a section.

    Args:
        default, factory: ``default`` and ``default_factory`` of ``dataclasses.field``; a field with neither is
            required.
        name: the key in YAML; None: the attribute's name.
        at_least, above, below, at_most: bounds of a number, or of each number in a list.
        from_yaml: False for a field that the caller fills.
        rest: whether the field, a dict, takes all keys that match no other field.
    """
    metadata = {
        "name": name,
        "from_yaml": from_yaml,
        "rest": rest,
        "bounds": {"at least": at_least, "above": above, "below": below, "at most": at_most},
    }
    if default is not _MISSING:
        return dataclasses.field(default=default, metadata=metadata)
    if factory is not _MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def build(cls: type[Section], content: Any, source: Source, section: str = "", **given: Any) -> Section:
    """Make a ``cls`` from a YAML mapping.

    Args:
        cls: a dataclass whose fields are declared with :func:`key` or plain defaults.
        content: the mapping; None for an empty section.
        source: the file that the mapping comes from.
        section: the dotted name of the mapping in the file; empty for the whole file.
        given: values of the fields declared with ``from_yaml=False``.

    Raises:
        UserError: a key is unknown or missing, or a value has a wrong type or is out of bounds.
    """
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{source.locate(section)} is {describe(content)}, expected a mapping of 'key: value' lines")
    fields = {yaml_name(field): field for field in _yaml_fields(cls)}
    rest = next((field for field in dataclasses.fields(cls) if field.metadata.get("rest")), None)
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = dict(given)
    unknown = {name: value for name, value in content.items() if name not in fields}
    if rest is not None:
        values[rest.name] = unknown
    else:
        for name in unknown:
            refuse_unknown(name, fields, source, section)
    for name, field in fields.items():
        dotted = _join(section, name)
        if name in content:
            values[field.name] = _convert(content[name], types[field.name], field, source, dotted)
        elif field.default is _MISSING and field.default_factory is _MISSING:
            expected = _expectation(types[field.name], field)
            raise UserError(f"{source.locate(dotted)} is missing, expected {expected}; add it")
    try:
        return cls(**values)
    except Invalid as invalid:
        raise UserError(f"{source.locate(_join(section, invalid.key))} {invalid.reason}") from None


def to_mapping(instance: Any) -> dict[str, Any]:
    """Return the YAML mapping of a dataclass made by :func:`build`, in plain types, without values that are None."""
    mapping: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.metadata.get("rest"):
            mapping.update(_plain(value))
        elif field.metadata.get("from_yaml", True) and value is not None:
            mapping[yaml_name(field)] = _plain(value)
    return mapping


def refuse_unknown(name: Any, known: Iterable[str], source: Source, section: str = "") -> None:
    """Raise the :class:`UserError` for an unknown key.

    Args:
        name: the unknown key.
        known: the known keys, for the message and its suggestion.
        source: the file that the key comes from.
        section: the dotted name of the section; empty for the whole file.
    """
    known = list(known)
    raise UserError(
        f"{source.locate(_join(section, str(name)))} is not a known key, expected one of {', '.join(known)}"
        f"{suggest(name, known)}"
    )


def yaml_name(field: dataclasses.Field[Any]) -> str:
    """Return a field's key in YAML."""
    return field.metadata.get("name") or field.name


def describe(value: Any) -> str:
    """Return a description of a YAML value for error messages."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, Tagged):
        return f"a !{value.name} node"
    return f"a list of {len(value)}" if isinstance(value, list) else "a mapping"


class _Mismatch(Exception):
    """A value does not have the type that it was compared with."""


def _yaml_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return [
        field
        for field in dataclasses.fields(cls)
        if field.metadata.get("from_yaml", True) and not field.metadata.get("rest")
    ]


def _join(section: str, name: str) -> str:
    return ".".join(part for part in (section, name) if part)


def _convert(value: Any, kind: Any, field: dataclasses.Field[Any], source: Source, name: str) -> Any:
    try:
        return _match(value, kind, field, source, name)
    except _Mismatch:
        expected = _expectation(kind, field)
        hint = suggest(value, _choices(kind)) if isinstance(value, str) else ""
        if isinstance(value, str) and _is_quoted(value, kind):
            hint = "; write it without quotes"
        if isinstance(value, float) and not math.isfinite(value):
            expected = expected.replace("a number", "a finite number")
        raise UserError(f"{source.locate(name)} is {describe(value)}, expected {expected}{hint}") from None


def _match(value: Any, kind: Any, field: dataclasses.Field[Any], source: Source, name: str) -> Any:
    """Return ``value`` as a ``kind``; raise ``_Mismatch``, or ``UserError`` for an error within a list or mapping."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if value is None or isinstance(value, dict):
            return build(kind, value, source, name)
        raise _Mismatch
    if origin is typing.Union:
        return _match_union(value, arguments, field, source, name)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _Mismatch
    if origin is list:
        if not isinstance(value, list):
            raise _Mismatch
        return [_convert(part, arguments[0], field, source, f"{name}[{index}]") for index, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _Mismatch
        return {part: _convert(held, arguments[1], field, source, f"{name}.{part}") for part, held in value.items()}
    if kind is Path:
        if not isinstance(value, str) or not value:
            raise _Mismatch
        return resolve_path(value, source.path)
    return _match_scalar(value, kind, field)


def _match_union(value: Any, kinds: tuple[Any, ...], field: Any, source: Source, name: str) -> Any:
    if value is None:
        if type(None) in kinds:
            return None
        raise _Mismatch
    for kind in kinds:
        # Lists and mappings are matched only with members that take them, whose error messages are the most precise.
        container = typing.get_origin(kind) in (list, dict) or dataclasses.is_dataclass(kind)
        if kind is type(None) or container != isinstance(value, (list, dict)):
            continue
        try:
            return _match(value, kind, field, source, name)
        except _Mismatch:
            continue
        except UserError:
            if kind is kinds[-1] or not isinstance(value, list):
                raise
    raise _Mismatch


def _match_scalar(value: Any, kind: Any, field: dataclasses.Field[Any]) -> Any:
    # bool is a subclass of int, but `batch_size: true` is an error.
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool):
        try:
            number = kind(value)
        except OverflowError:
            raise _Mismatch from None
        if abs(number) < (_TOO_WHOLE if kind is int else math.inf) and _within(number, field):
            return number
    raise _Mismatch


def _within(number: float, field: dataclasses.Field[Any]) -> bool:
    bounds: Mapping[str, Any] = field.metadata.get("bounds", {})
    at_least, above, below, at_most = (bounds.get(word) for word in ("at least", "above", "below", "at most"))
    return (
        (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )


def _expectation(kind: Any, field: dataclasses.Field[Any]) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        return " or ".join(_expectation(part, field) for part in arguments if part is not type(None))
    if origin is typing.Literal:
        shown = [str(choice) for choice in arguments[:_SHOWN_CHOICES]]
        return f"one of {', '.join(shown)}" + (", ..." if len(arguments) > _SHOWN_CHOICES else "")
    if origin is list:
        return f"a list, each {_expectation(arguments[0], field)}"
    if kind in (int, float):
        bounds = [f"{word} {bound:g}" for word, bound in field.metadata.get("bounds", {}).items() if bound is not None]
        return " ".join(["a whole number" if kind is int else "a number", " and ".join(bounds)]).strip()
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a mapping of 'key: value' lines"
    return {bool: "true or false", str: "text", Path: "a path"}.get(kind, "a value")


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [choice for part in typing.get_args(kind) for choice in _choices(part)]


def _is_quoted(text: str, kind: Any) -> bool:
    """Return whether a text would have the type ``kind`` in YAML if it were not in quotes."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
    if bool in kinds and text.lower() in ("true", "false", "yes", "no", "on", "off"):
        return True
    try:
        return bool({int, float} & set(kinds)) and math.isfinite(float(text))
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, dict):
        return {part: _plain(held) for part, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
