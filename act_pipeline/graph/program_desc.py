"""Reading and changing a program as the protobuf message that Paddle keeps it in (``framework_pb2.ProgramDesc``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


def variables(slots: Any) -> Iterator[str]:
    """Give the names of the variables in all slots of an op's ``inputs`` or ``outputs``.

    Only slots that hold some are asked for them: protobuf 7 makes, and frees, a block of memory for each that does not
    (see :func:`keep`).
    """
    for slot in slots:
        for field, value in slot.ListFields():
            if field.name == "arguments":
                yield from value


def argument(slots: Any, name: str) -> str:
    """Return the variable in a slot of an op's ``inputs`` or ``outputs``; empty: none is there."""
    return next((slot.arguments[0] for slot in slots if slot.parameter == name and slot.arguments), "")


def whole(op: Any, name: str) -> int:
    """Return an attribute that is a whole number; -1: there is none."""
    return next((attribute.i for attribute in op.attrs if attribute.name == name), -1)


def wholes(op: Any, name: str) -> list[int]:
    """Return an attribute that is a list of whole numbers; empty: there is none."""
    return next((list(attribute.ints) for attribute in op.attrs if attribute.name == name), [])


def text(op: Any, name: str) -> str:
    """Return an attribute that is a text; empty: there is none."""
    return next((attribute.s for attribute in op.attrs if attribute.name == name), "")


def flag(op: Any, name: str) -> bool:
    """Return an attribute that is true or false; False: there is none."""
    return next((attribute.b for attribute in op.attrs if attribute.name == name), False)


def keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove the other items of a message's list.

    In place: each message of its own has memory of its own, and with every 10,000th that protobuf 7 frees it gives all
    that the process has free back to the system (``malloc_trim``), which a training takes again page by page.
    """
    for index in reversed([index for index, item in enumerate(items) if not wanted(item)]):
        del items[index]


def parsed(raw: bytes) -> Any:
    """Return a serialized program as a ``framework_pb2.ProgramDesc``."""
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc()
    program.ParseFromString(raw)
    return program


def splice(
    block: Any, at: int, ops: Iterable[Any], described: Iterable[Any], names: Mapping[str, str], prefix: str
) -> int:
    """Insert ops of another program.

    Args:
        block: where; changed in place.
        at: index of the op before which they come.
        ops: they are changed.
        described: descriptions of their variables.
        names: variable of theirs -> variable of the block.
        prefix: of the block's names of their other variables.

    Returns:
        the index after them.
    """
    for op in ops:
        for slot in (*op.inputs, *op.outputs):
            held = [names.get(name, prefix + name) for name in variables([slot])]
            if held:
                slot.arguments[:] = held
        block.ops.insert(at, op)
        at += 1
    for variable in described:
        if variable.name not in names:
            block.vars.add().CopyFrom(variable)
            block.vars[-1].name = prefix + variable.name
    return at
