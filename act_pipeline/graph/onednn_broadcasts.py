"""Broadcasts over inner dimensions, for which oneDNN's kernels are slow, as explicit expansions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from act_pipeline.graph.program_desc import argument, sizes_of_tensors

_MIN_RANK = 6


@dataclass(frozen=True)
class _Broadcast:
    """An operand that an op broadcasts.

    Attributes:
        index: position of the op in the block.
        slot: input of the op that holds the operand.
        operand: name of the operand.
        shape: shape of the other operand.
        axes: the axes of ``shape`` over which the operand, of size 1 there, is broadcast.
    """

    index: int
    slot: str
    operand: str
    shape: tuple[int, ...]
    axes: slice


def spread_for_onednn(program: Any) -> int:
    """Expand the smaller operand of additions and products of rank 6 or more that broadcast over inner dimensions.

    OneDNN takes 100 ns for each element of such a broadcast (RT-DETR's sampling points: offsets of each head, level and
    point, times the size of a box), and hardly any time for operands of one shape.

    Args:
        program: a ``framework_pb2.ProgramDesc``, changed in place.

    Returns:
        Number of operands expanded.
    """
    block = program.blocks[0]
    broadcasts = list(_broadcasts(block))
    for number, broadcast in enumerate(reversed(broadcasts)):  # from the end: the positions before it stay valid
        _expand(block, broadcast, f"spread_for_onednn_{number}")
    return len(broadcasts)


def _broadcasts(block: Any) -> Iterator[_Broadcast]:
    sizes = sizes_of_tensors(block)
    for index, op in enumerate(block.ops):
        if op.type in ("elementwise_add", "elementwise_mul"):
            by_slot = {slot: argument(op.inputs, slot) for slot in ("X", "Y")}
            small, large = sorted(by_slot, key=lambda slot: abs(math.prod(sizes[by_slot[slot]])))
            shape = sizes[by_slot[large]]
            axes = _broadcast_axes(sizes[by_slot[small]], shape)
            if axes is not None and len(shape) >= _MIN_RANK:
                yield _Broadcast(index, small, by_slot[small], shape, axes)


def _broadcast_axes(small: Sequence[int], large: Sequence[int]) -> slice | None:
    """Return the range of dimensions, all of size 1, over which ``small`` is broadcast to ``large``; None otherwise."""
    unlike = [axis for axis, (one, other) in enumerate(zip(small, large)) if one != other]
    if len(small) != len(large) or not unlike:
        return None
    between = slice(unlike[0], unlike[-1] + 1)
    return between if set(small[between]) == {1} and min(large[between.start :]) > 0 else None


def _expand(block: Any, broadcast: _Broadcast, prefix: str) -> None:
    """Insert ops before the reader of an operand that give it the shape of the other operand."""
    inner = math.prod(broadcast.shape[broadcast.axes.stop :])
    repeats = math.prod(broadcast.shape[broadcast.axes])
    source, index = broadcast.operand, broadcast.index
    steps = (
        ("reshape2", (-1, 1, inner)),
        ("expand_v2", (-1, repeats, inner)),
        ("reshape2", broadcast.shape),
    )
    for step, (op_type, shape) in enumerate(steps):
        made = f"{prefix}_{step}"
        _declare_like(block, broadcast.operand, made, shape)
        _insert(block, index + step, op_type, source, made, shape)
        source = made
    reader = block.ops[index + len(steps)]
    next(held for held in reader.inputs if held.parameter == broadcast.slot).arguments[:] = [source]


def _declare_like(block: Any, name: str, made: str, shape: Sequence[int]) -> None:
    described = block.vars.add()
    described.CopyFrom(next(variable for variable in block.vars if variable.name == name))
    described.name = made
    described.type.lod_tensor.tensor.dims[:] = shape


def _insert(block: Any, index: int, op_type: str, source: str, made: str, shape: Sequence[int]) -> None:
    """Insert an op with the attribute ``shape``, in which -1 is the size of the input."""
    from paddle.base.proto import framework_pb2

    op = block.ops.add(type=op_type)
    op.attrs.add(name="shape", type=framework_pb2.INTS, ints=shape)
    op.inputs.add(parameter="X", arguments=[source])
    op.outputs.add(parameter="Out", arguments=[made])
    block.ops.insert(index, op)
    del block.ops[-1]
