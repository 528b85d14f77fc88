"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021) by gathering rows, which is faster on a CPU.

PaddleDetection's ``deformable_attention_core_func`` samples each level by ``grid_sampler``, multiplies the samples by
the attention weights and sums them. ``grid_sampler`` iterates over the channels, which are far apart in memory. Here
the channels of a head at a pixel are one row of the values in their original layout. The rows at the four corners of
all points of a query are gathered, and one matrix product with bilinear weight times attention weight sums them. Only
the order in which floats are added differs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from act_pipeline.graph.attention_search import Attention, Search, Shape
from act_pipeline.graph.program_desc import parsed, splice, variables
from act_pipeline.graph.unread_ops import remove_unread


def attend_by_rows(program: Any) -> int:
    """Replace the deformable attentions that PaddleDetection exports: bilinear, with zeros outside.

    Attentions of another form are left unchanged.

    Args:
        program: a ``framework_pb2.ProgramDesc`` without gradients, changed in place.

    Returns:
        Number of attentions replaced.
    """
    block = program.blocks[0]
    search = Search(block)
    attentions = search.attentions()
    unread: set[str] = set()
    for number, attention in enumerate(attentions):
        unread |= _replace(block, attention, f"attention_by_rows_{number}/")
    remove_unread(block, unread)
    return len(attentions)


def samples_by_rows(program: Any) -> bool:
    """Return whether :func:`attend_by_rows` would replace all ``grid_sampler`` ops of a program.

    Args:
        program: a ``framework_pb2.ProgramDesc``.
    """
    block = program.blocks[0]
    replaced = sum(len(attention.shape.levels) for attention in Search(block).attentions())
    return replaced == sum(op.type == "grid_sampler" for op in block.ops)


def _replace(block: Any, attention: Attention, prefix: str) -> set[str]:
    """Replace the attention's last op with the ops of :func:`_by_rows`, and return the inputs of the removed op."""
    made = parsed(_program_by_rows(attention.shape)).blocks[0]
    names = {name: getattr(attention, name) for name in ("values", "grids", "weights", "output")}
    at = next(index for index, op in enumerate(block.ops) if attention.output in variables(op.outputs))
    read = set(variables(block.ops[at].inputs))
    del block.ops[at]
    splice(block, at, made.ops, made.vars, names, prefix)
    return read


@functools.lru_cache(maxsize=16)
def _program_by_rows(shape: Shape) -> bytes:
    """Return :func:`_by_rows` as a serialized program with inputs `values`, `grids`, `weights` and output `output`."""
    with tracing(shape) as (program, (values, grids, weights)):
        output = _by_rows(values, grids, weights, shape)
        output.block._rename_var(output.name, "output")
    return serialized(program)


@contextlib.contextmanager
def tracing(shape: Shape) -> Iterator[tuple[Any, list[Any]]]:
    """Trace what the block computes into a new program.

    Args:
        shape: the sizes of the attention.

    Yields:
        The program, and its input variables `values`, `grids` and `weights`, float32, see :class:`Attention`.
    """
    import paddle

    from act_pipeline.graph.static_graph import static_mode

    levels, program = len(shape.levels), paddle.static.Program()
    sizes = {
        "values": (shape.pixels, shape.heads, shape.channels),
        "grids": (shape.queries, shape.heads, levels, shape.points, 2),
        "weights": (shape.queries, shape.heads, levels * shape.points),
    }
    with static_mode(), paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
        block = program.global_block()
        yield program, [block.create_var(name=name, shape=(-1, *size), dtype="float32") for name, size in sizes.items()]


def serialized(program: Any) -> bytes:
    """Return a traced `paddle.static.Program` serialized, without ``op_callstack`` attributes."""
    for op in program.global_block().ops:
        op._remove_attr("op_callstack")
    return program.desc.serialize_to_string()


def _by_rows(values: Any, grids: Any, weights: Any, shape: Shape) -> Any:
    """Compute ``sum over levels and points of weight * sample(values of the level, grid)``.

    Args:
        values, grids, weights: see :class:`Attention`.
        shape: their sizes.

    Returns:
        [N, queries, heads * channels].
    """
    import paddle

    shares, found = corners(values, grids, shape, weights)
    count = 4 * len(shape.levels) * shape.points
    total = paddle.bmm(paddle.reshape(shares, [-1, 1, count]), paddle.reshape(found, [-1, count, shape.channels]))
    return paddle.reshape(total, [-1, shape.queries, shape.heads * shape.channels])


def corners(values: Any, grids: Any, shape: Shape, weights: Any = None) -> tuple[Any, Any]:
    """Return the bilinear weights of the four corners of each sampling point, and the rows of values there.

    A sample at (x, y), in pixels, is the sum over pixels (i, j) of ``max(0, 1 - |x - i|) * max(0, 1 - |y - j|)`` times
    the value of the pixel: bilinear, with zeros outside. Only the four pixels around the point contribute; for a point
    outside, the nearest four pixels inside are used.

    Args:
        values, grids, weights: see :class:`Attention`; None for ``weights``: the attention weights are 1.
        shape: their sizes.

    Returns:
        The bilinear weights times the attention weights, [N, queries, heads * levels * points, 4], and the rows,
        [N * queries * heads * levels * points * 4, channels].
    """
    import paddle

    heights, widths = (np.array(sizes) for sizes in zip(*shape.levels))
    count = len(shape.levels) * shape.points

    # x and y, and the corners, are separate tensors, because Paddle is slow on a last dimension of 2 or 4.
    def constant(of_level: np.ndarray, of_head: Sequence[int] = (0,) * shape.heads, dtype: type = np.float32) -> Any:
        """Return a constant [heads * levels * points], the sum of a value for each level and one for each head."""
        by_head = np.add.outer(np.array(of_head), np.repeat(of_level, shape.points))
        return paddle.assign(by_head.reshape(-1).astype(dtype))

    def along(axis: int, extent: np.ndarray) -> tuple[Any, Any, Any]:
        """Return the first of the two neighbouring pixels along an axis, and the linear weights of both."""
        at = paddle.reshape(paddle.slice(grids, [5], [axis], [axis + 1]), [-1, shape.queries, shape.heads * count])
        at = at * constant(extent / 2) + constant((extent - 1) / 2)
        # fmax and ReLU: a NaN must not become a memory address; it is treated as a point outside.
        first = paddle.minimum(paddle.fmax(paddle.floor(at), paddle.zeros([1])), constant(extent - 2))
        first.stop_gradient = True
        beyond = at - first
        return first, *(paddle.nn.functional.relu(1 - paddle.abs(beyond - pixel)) for pixel in (0, 1))

    column, left, right = along(0, widths)
    line, upper, lower = along(1, heights)
    if weights is not None:
        by_point = paddle.reshape(weights, [-1, shape.queries, shape.heads * count])
        upper, lower = upper * by_point, lower * by_point
    shares = paddle.stack([upper * left, upper * right, lower * left, lower * right], axis=-1)

    # Integers: a runtime may compute floats in bf16, which has 8 bits.
    starts = np.cumsum([0, *(heights * widths)[:-1]])
    whole_line, whole_column = (paddle.cast(at, "int64") for at in (line, column))
    length = constant(widths * shape.heads, dtype=np.int64)
    row = whole_line * length + whole_column * shape.heads
    row = row + constant(starts * shape.heads, range(shape.heads), np.int64)
    below = row + length
    rows = paddle.stack([row, row + shape.heads, below, below + shape.heads], axis=-1)
    image = paddle.cumsum(paddle.ones_like(grids[:, 0, 0, 0, 0, :1]), axis=0) - 1
    image = paddle.reshape(paddle.cast(image, "int64") * (shape.pixels * shape.heads), [-1, 1, 1, 1])
    rows = paddle.reshape(rows + image, [-1])
    return shares, paddle.gather(paddle.reshape(values, [-1, shape.channels]), rows)
