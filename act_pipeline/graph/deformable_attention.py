"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021) by rows: the same sums, sooner on a CPU.

PaddleDetection's (``deformable_attention_core_func``) samples each level by ``grid_sampler``, which walks over the
channels, each elsewhere in memory, multiplies what it found by the attention, and adds up. Here the channels of a head
at a pixel are one row of the values as they lie: the rows at the four corners of all points of a query are gathered,
and one product with bilinear weight times attention adds them up. Floats are added in another order; nothing else
differs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.graph.program_desc import argument, flag, parsed, splice, text, variables, whole, wholes


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention: height and width of each level, and how many of what."""

    levels: tuple[tuple[int, int], ...]
    queries: int
    heads: int
    points: int
    channels: int

    @property
    def pixels(self) -> int:
        """Of all levels."""
        return sum(height * width for height, width in self.levels)


@dataclass(frozen=True)
class Attention:
    """An attention of a program: its sizes, the names of what it reads and writes, and of what lies between.

    Attributes:
        shape: the sizes.
        values: [N, pixels of all levels, heads, channels].
        grids: [N, queries, heads, levels, points, 2], x and y from -1 to 1.
        weights: [N, queries, heads, levels * points].
        output: [N, queries, heads * channels].
        turned: the weights and each level's values as ``transpose2`` gives them.
        moved: tensor between them -> the tensor of the program whose elements it has.
        made: other tensor between them -> whose elements it has: the ``output``'s, before some are added up the
            ``product`` of weights and samples, ``sampled`` in all levels, ``sampled_0`` in the first level and so on.
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
    """Replace the deformable attentions that sample bilinearly, with zeros outside, as PaddleDetection exports them.

    Args:
        program: a ``framework_pb2.ProgramDesc`` without gradients, changed in place.

    Returns:
        how many were replaced; what looks otherwise stays as it is.
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
    """Say of a ``framework_pb2.ProgramDesc`` whether :func:`attend_by_rows` leaves no ``grid_sampler`` in it."""
    block = program.blocks[0]
    replaced = sum(len(attention.shape.levels) for attention in Search(block).attentions())
    return replaced == sum(op.type == "grid_sampler" for op in block.ops)


def spread_for_onednn(program: Any) -> int:
    """Let no addition or product repeat one of its tensors over dimensions between others, of 6 and more.

    OneDNN takes 100 ns an element for such (RT-DETR's points: offsets of each head, level and point, times the size of
    a box), and next to nothing for tensors of one shape.

    Args:
        program: a ``framework_pb2.ProgramDesc``, changed in place.

    Returns:
        how many tensors are repeated by an op of their own.
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
            spread.attrs.add(name="shape", type=framework_pb2.INTS, ints=made)  # -1: as many as there are
            spread.inputs.add(parameter="X", arguments=[small])
            spread.outputs.add(parameter="Out", arguments=[name])
            block.ops.insert(index, spread)
            del block.ops[-1]
            small, index = name, index + 1
        next(held for held in block.ops[index].inputs if held.parameter == slot).arguments[:] = [small]
    return len(found)


def _repeated(small: Sequence[int], large: Sequence[int]) -> slice | None:
    """Return the dimensions over which a tensor is repeated to be as large as another; None: it is otherwise."""
    unlike = [axis for axis, (one, other) in enumerate(zip(small, large)) if one != other]
    if len(small) != len(large) or not unlike:
        return None
    between = slice(unlike[0], unlike[-1] + 1)
    return between if set(small[between]) == {1} and min(large[between.start :]) > 0 else None


class Search:
    """Looks for attentions from their last tensor to their first."""

    def __init__(self, block: Any) -> None:
        self._sizes = _sizes(block)
        self._writers = {name: op for op in block.ops for name in variables(op.outputs)}

    def attentions(self) -> list[Attention]:
        """Return all, in the order of the program."""
        turning = [name for name, op in self._writers.items() if name == argument(op.outputs, "Out")]
        return [found for found in map(self.attention, turning) if found]

    def attention(self, output: str) -> Attention | None:
        """Return the attention whose output this is."""
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
        """Return the op that writes a variable; None: one of another type does."""
        op = self._writers.get(name)
        return op if op is not None and op.type == op_type else None

    def _level(self, sample: str, number: int) -> _Level | None:
        """Return what a sample is made of, if it is that of this level."""
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
        """Return a tensor and what it was before each of these ops, the last first; empty: others made it."""
        walked = [name]
        for op_type, axes in steps:
            op = self.writer(walked[-1], op_type)
            if op is None or (axes and wholes(op, "axis") + wholes(op, "dim") != axes) or flag(op, "reduce_all"):
                return []
            walked.append(argument(op.inputs, "X"))
        return walked


@dataclass(frozen=True)
class _Level:
    """What an attention reads of one level: from which tensors, of what height and width; see :class:`Attention`."""

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
    """Put the ops of :func:`_by_rows` where the attention's last op is, and return what that read."""
    made = parsed(_program_by_rows(attention.shape)).blocks[0]
    names = {name: getattr(attention, name) for name in ("values", "grids", "weights", "output")}
    at = next(index for index, op in enumerate(block.ops) if attention.output in variables(op.outputs))
    read = set(variables(block.ops[at].inputs))
    del block.ops[at]
    splice(block, at, made.ops, made.vars, names, prefix)
    return read


@functools.lru_cache(maxsize=16)
def _program_by_rows(shape: Shape) -> bytes:
    """Return :func:`_by_rows` as a program that reads `values`, `grids` and `weights` and writes `output`."""
    with tracing(shape) as (program, (values, grids, weights)):
        output = _by_rows(values, grids, weights, shape)
        output.block._rename_var(output.name, "output")
    return serialized(program)


@contextlib.contextmanager
def tracing(shape: Shape) -> Iterator[tuple[Any, list[Any]]]:
    """Trace what the block computes into a program; give that, and its `values`, `grids` and `weights`."""
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
    """Return a traced program without the traces of its making."""
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
    """Return the rows at the four corners of each point, and their shares of its sample (times its weight).

    A sample at (x, y), in pixels, is the sum over pixels (i, j) of ``max(0, 1 - |x - i|) * max(0, 1 - |y - j|)`` times
    the value there: bilinear, with zeros outside. Four pixels that are next to it, or nearest from outside, hold all
    that is not 0.

    Args:
        values, grids, weights: see :class:`Attention`; without weights, they are 1.
        shape: their sizes.

    Returns:
        shares [N, queries, heads * levels * points, 4], rows [N * queries * heads * levels * points * 4, channels].
    """
    import paddle

    heights, widths = (np.array(sizes) for sizes in zip(*shape.levels))
    count = len(shape.levels) * shape.points

    # Directions and corners are tensors of their own: Paddle takes its time over a last dimension of 2 or 4.
    def constant(of_level: np.ndarray, of_head: Sequence[int] = (0,) * shape.heads) -> Any:
        """Return [heads * levels * points]: each point has the sum of its level's number and its head's."""
        by_head = np.add.outer(np.array(of_head), np.repeat(of_level, shape.points))
        return paddle.assign(by_head.reshape(-1).astype(np.float32))

    def along(axis: int, extent: np.ndarray) -> tuple[Any, Any, Any]:
        """Return the first of two neighbouring pixels in a direction, and the shares of both."""
        at = paddle.reshape(paddle.slice(grids, [5], [axis], [axis + 1]), [-1, shape.queries, shape.heads * count])
        at = at * constant(extent / 2) + constant((extent - 1) / 2)
        # fmax, and ReLU: a point that is not a number is no place in memory, and counts as one outside.
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


def remove_unread(block: Any, names: set[str]) -> None:
    """Remove the ops that write these variables, or what only such ops read, where nothing reads them any more."""
    reads = Counter(name for op in block.ops for name in variables(op.inputs))
    for index in reversed(range(len(block.ops))):
        op = block.ops[index]
        written = set(variables(op.outputs))
        if written & names and not any(reads[name] for name in written):
            read = list(variables(op.inputs))
            reads.subtract(read)
            names.update(read)
            del block.ops[index]
