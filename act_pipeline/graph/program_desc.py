"""Reading and editing of a program as a protobuf message (``framework_pb2.ProgramDesc``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Names in Paddle's framework.proto -> NumPy's.
_DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip


def variables(slots: Any) -> Iterator[str]:
    """Yield the names of the variables in all slots of an op's ``inputs`` or ``outputs``.

    ``arguments`` is read only from slots that have some: for an empty slot protobuf 7 allocates and frees a block of
    memory (see :func:`keep`).
    """
    for slot in slots:
        for field, value in slot.ListFields():
            if field.name == "arguments":
                yield from value


def argument(slots: Any, name: str) -> str:
    """Return the first variable in a slot of an op's ``inputs`` or ``outputs``; empty if there is none."""
    return next((slot.arguments[0] for slot in slots if slot.parameter == name and slot.arguments), "")


def whole(op: Any, name: str) -> int:
    """Return an integer attribute of an op; -1 if it has none."""
    return next((attribute.i for attribute in op.attrs if attribute.name == name), -1)


def wholes(op: Any, name: str) -> list[int]:
    """Return an integer list attribute of an op; empty if it has none."""
    return next((list(attribute.ints) for attribute in op.attrs if attribute.name == name), [])


def text(op: Any, name: str) -> str:
    """Return a string attribute of an op; empty if it has none."""
    return next((attribute.s for attribute in op.attrs if attribute.name == name), "")


def flag(op: Any, name: str) -> bool:
    """Return a boolean attribute of an op; False if it has none."""
    return next((attribute.b for attribute in op.attrs if attribute.name == name), False)


def dtype_of_tensor(variable: Any) -> str:
    """Return the dtype of a variable, such as ``int64``; ``float32`` for one that NumPy does not have."""
    number = variable.type.lod_tensor.tensor.data_type
    return _DTYPES.get(type(variable.type).Type.Name(number), "float32")


def sizes_of_tensors(block: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a block, -1 for a dynamic dimension."""
    return {variable.name: tuple(variable.type.lod_tensor.tensor.dims) for variable in block.vars}


def keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove the unwanted items of a repeated protobuf field, in place.

    Rebuilding the list would free messages. At every 10,000th freed message protobuf 7 returns all free memory of the
    process to the system (``malloc_trim``), which training must then allocate again page by page.

    Args:
        items: the repeated field.
        wanted: returns whether to keep an item.
    """
    for index in reversed([index for index, item in enumerate(items) if not wanted(item)]):
        del items[index]


def parsed(raw: bytes) -> Any:
    """Parse a serialized program to a ``framework_pb2.ProgramDesc``."""
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc()
    program.ParseFromString(raw)
    return program


def splice(
    block: Any, at: int, ops: Iterable[Any], described: Iterable[Any], names: Mapping[str, str], prefix: str
) -> int:
    """Insert ops of another program into a block.

    Args:
        block: the block, changed in place.
        at: index of the op before which to insert.
        ops: the ops to insert; their variables are renamed in place.
        described: the ``VarDesc`` of their variables.
        names: their variable -> the variable of the block that replaces it.
        prefix: prefix of the names of all other variables in the block.

    Returns:
        Index after the last inserted op.
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
