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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.graph.program_desc import argument, flag, parsed, splice, text, variables, whole, wholes
from act_pipeline.graph.unread_ops import remove_unread


@dataclass(frozen=True)
class Shape:
    """Sizes of a deformable attention.

    Attributes:
        levels: (height, width) of each level, pixels.
        queries: number of queries.
        heads: number of heads.
        points: number of sampling points for each head and level.
        channels: number of channels of a head.
    """

    levels: tuple[tuple[int, int], ...]
    queries: int
    heads: int
    points: int
    channels: int

    @property
    def pixels(self) -> int:
        """Number of pixels of all levels."""
        return sum(height * width for height, width in self.levels)


@dataclass(frozen=True)
class Attention:
    """A deformable attention found in a program: its sizes and the names of its tensors.

    Attributes:
        shape: the sizes.
        values: input, [N, pixels of all levels, heads, channels].
        grids: input, [N, queries, heads, levels, points, 2], x and y in [-1, 1].
        weights: input, [N, queries, heads, levels * points].
        output: output, [N, queries, heads * channels].
        turned: the outputs of the ``transpose2`` ops of the weights and of each level's values.
        moved: intermediate tensor -> the input tensor (or part of it) whose elements it contains, reordered.
        made: other intermediate tensor -> its role: ``output`` (the same elements as the output), ``product`` (of
            weights and samples), ``sampled`` (samples of all levels), ``sampled_0`` (samples of the first level), ...
    """

    shape: Shape
    values: str
    grids: str
    weights: str
    output: str
    turned: tuple[str, ...]
    moved: Mapping[str, str]
    made: Mapping[str, str]


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


def spread_for_onednn(program: Any) -> int:
    """Expand the smaller operand of additions and products of rank 6 or more that broadcast over inner dimensions.

    OneDNN takes 100 ns for each element of such a broadcast (RT-DETR's sampling points: offsets of each head, level and
    point, times the size of a box), and hardly any time for operands of one shape.

    Args:
        program: a ``framework_pb2.ProgramDesc``, changed in place.

    Returns:
        Number of operands expanded.
    """
    from paddle.base.proto import framework_pb2

    block = program.blocks[0]
    sizes = _sizes(block)
    found = []
    for index, op in enumerate(block.ops):
        if op.type in ("elementwise_add", "elementwise_mul"):
            by_slot = {slot: argument(op.inputs, slot) for slot in ("X", "Y")}
            small, large = sorted(by_slot, key=lambda slot: abs(math.prod(sizes[by_slot[slot]])))
            shape = sizes[by_slot[large]]
            between = _repeated(sizes[by_slot[small]], shape)
            if between is not None and len(shape) >= 6:
                found.append((index, small, by_slot[small], shape, between))
    for number, (index, slot, small, shape, between) in enumerate(reversed(found)):
        rest = math.prod(shape[between.stop :])
        steps = (("reshape2", (-1, 1, rest)), ("expand_v2", (-1, math.prod(shape[between]), rest)), ("reshape2", shape))
        for step, (op_type, made) in enumerate(steps):
            name = f"spread_for_onednn_{number}_{step}"
            described = block.vars.add()
            described.CopyFrom(next(variable for variable in block.vars if variable.name == small))
            described.name = name
            described.type.lod_tensor.tensor.dims[:] = made
            spread = block.ops.add(type=op_type)
            spread.attrs.add(name="shape", type=framework_pb2.INTS, ints=made)  # -1: the size of the input
            spread.inputs.add(parameter="X", arguments=[small])
            spread.outputs.add(parameter="Out", arguments=[name])
            block.ops.insert(index, spread)
            del block.ops[-1]
            small, index = name, index + 1
        next(held for held in block.ops[index].inputs if held.parameter == slot).arguments[:] = [small]
    return len(found)


def _repeated(small: Sequence[int], large: Sequence[int]) -> slice | None:
    """Return the range of dimensions, all of size 1, over which ``small`` is broadcast to ``large``; None otherwise."""
    unlike = [axis for axis, (one, other) in enumerate(zip(small, large)) if one != other]
    if len(small) != len(large) or not unlike:
        return None
    between = slice(unlike[0], unlike[-1] + 1)
    return between if set(small[between]) == {1} and min(large[between.start :]) > 0 else None


class Search:
    """Finds deformable attentions by matching their ops backwards from the output."""

    def __init__(self, block: Any) -> None:
        self._sizes = _sizes(block)
        self._writers = {name: op for op in block.ops for name in variables(op.outputs)}

    def attentions(self) -> list[Attention]:
        """Return all deformable attentions, in the order of the program."""
        turning = [name for name, op in self._writers.items() if name == argument(op.outputs, "Out")]
        return [found for found in map(self.attention, turning) if found]

    def attention(self, output: str) -> Attention | None:
        """Return the deformable attention that writes the tensor ``output``; None if there is none."""
        walked = self._back(output, ("transpose2", [0, 2, 1]), ("reshape2", []), ("reduce_sum", [-1]))
        multiplying = self.writer(walked[-1], "elementwise_mul") if walked else None
        if multiplying is None:
            return None
        _, reshaped, total, product = walked
        sampled, weights = (argument(multiplying.inputs, slot) for slot in ("X", "Y"))
        by_head = self._back(weights, ("reshape2", []), ("transpose2", [0, 2, 1, 3]))
        joining = self.writer(sampled, "concat")
        if joining is None or not by_head or whole(joining, "axis") not in (-1, 3):
            return None
        samples = list(variables(joining.inputs))
        found = [self._level(name, number) for number, name in enumerate(samples)]
        levels = [level for level in found if level is not None]
        if len(levels) < len(samples) or len({(level.values, level.grids) for level in levels}) > 1:
            return None
        values, grids = levels[0].values, levels[0].grids
        _, pixels, heads, channels = self._sizes[values]
        _, queries, _, _, points, _ = self._sizes[grids]
        shape = Shape(tuple(level.size for level in levels), queries, heads, points, channels)
        if pixels != shape.pixels or min(queries, heads, points, channels) < 1:
            return None
        moved = dict.fromkeys(by_head[:-1], by_head[-1])
        for level in levels:
            moved.update(level.moved)
        made = {reshaped: "output", total: "output", product: "product", sampled: "sampled"}
        made.update({name: f"sampled_{number}" for number, name in enumerate(samples)})
        turned = (by_head[1], *(level.turned for level in levels))
        return Attention(shape, values, grids, by_head[-1], output, turned, moved, made)

    def writer(self, name: str, op_type: str) -> Any:
        """Return the op that writes a variable; None if there is none or it is not of type ``op_type``."""
        op = self._writers.get(name)
        return op if op is not None and op.type == op_type else None

    def _level(self, sample: str, number: int) -> _Level | None:
        """Return the inputs of the sample of level ``number``; None if the ops do not match."""
        sampler = self.writer(sample, "grid_sampler")
        if sampler is None or not _bilinear_with_zeros(sampler):
            return None
        feature, grid = argument(sampler.inputs, "X"), argument(sampler.inputs, "Grid")
        guard = self.writer(grid, "elementwise_fmax")  # see `act_pipeline.execution.finite_checks.guard_grids`
        values = self._back(feature, ("reshape2", []), ("transpose2", [0, 2, 3, 1]))
        grid = argument(guard.inputs, "X") if guard else grid
        grids = self._back(grid, ("reshape2", []), ("transpose2", [0, 2, 1, 3, 4]))
        split = self.writer(values[-1], "split") if values else None
        part = self.writer(grids[-1], "slice") if grids else None
        size = self._sizes[feature][-2:]
        if split is None or part is None or min(size) < 2:
            return None
        if whole(split, "axis") != 1 or list(variables(split.outputs)).index(values[-1]) != number:
            return None
        if [wholes(part, name) for name in ("axes", "starts", "decrease_axis")] != [[3], [number], [3]]:
            return None
        moved = {**dict.fromkeys(values[:-1], values[-1]), **dict.fromkeys(grids[:-1], grids[-1])}
        return _Level(argument(split.inputs, "X"), argument(part.inputs, "Input"), (size[0], size[1]), values[1], moved)

    def _back(self, name: str, *steps: tuple[str, Sequence[int]]) -> list[str]:
        """Return a tensor and the inputs of the given chain of ops, last op first; empty if an op does not match."""
        walked = [name]
        for op_type, axes in steps:
            op = self.writer(walked[-1], op_type)
            if op is None or (axes and wholes(op, "axis") + wholes(op, "dim") != axes) or flag(op, "reduce_all"):
                return []
            walked.append(argument(op.inputs, "X"))
        return walked


@dataclass(frozen=True)
class _Level:
    """The tensors of one level of an attention, and its (height, width); see :class:`Attention`."""

    values: str
    grids: str
    size: tuple[int, int]
    turned: str
    moved: Mapping[str, str]


def _sizes(block: Any) -> dict[str, tuple[int, ...]]:
    return {variable.name: tuple(variable.type.lod_tensor.tensor.dims) for variable in block.vars}


def _bilinear_with_zeros(sampler: Any) -> bool:
    return (text(sampler, "mode"), text(sampler, "padding_mode")) == ("bilinear", "zeros") and not flag(
        sampler, "align_corners"
    )


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
    def constant(of_level: np.ndarray, of_head: Sequence[int] = (0,) * shape.heads) -> Any:
        """Return a constant [heads * levels * points], the sum of a value for each level and one for each head."""
        by_head = np.add.outer(np.array(of_head), np.repeat(of_level, shape.points))
        return paddle.assign(by_head.reshape(-1).astype(np.float32))

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

    starts = np.cumsum([0, *(heights * widths)[:-1]])
    row = line * constant(widths * shape.heads) + column * shape.heads
    row = row + constant(starts * shape.heads, range(shape.heads))
    below = row + constant(widths * shape.heads)
    rows = paddle.cast(paddle.stack([row, row + shape.heads, below, below + shape.heads], axis=-1), "int64")
    image = paddle.cumsum(paddle.ones_like(grids[:, 0, 0, 0, 0, :1]), axis=0) - 1
    image = paddle.reshape(paddle.cast(image, "int64") * (shape.pixels * shape.heads), [-1, 1, 1, 1])
    rows = paddle.reshape(rows + image, [-1])
    return shares, paddle.gather(paddle.reshape(values, [-1, shape.channels]), rows)
