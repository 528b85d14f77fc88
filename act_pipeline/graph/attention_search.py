"""The search for the deformable attentions that PaddleDetection exports, by matching their ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_pipeline.graph.program_desc import argument, flag, sizes_of_tensors, text, variables, whole, wholes


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


class Search:
    """Finds deformable attentions by matching their ops backwards from the output."""

    def __init__(self, block: Any) -> None:
        self._sizes = sizes_of_tensors(block)
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
        levels = self._levels(samples)
        shape = self._shape(levels) if levels else None
        if shape is None:
            return None
        moved = dict.fromkeys(by_head[:-1], by_head[-1])
        for level in levels:
            moved.update(level.moved)
        made = {reshaped: "output", total: "output", product: "product", sampled: "sampled"}
        made.update({name: f"sampled_{number}" for number, name in enumerate(samples)})
        turned = (by_head[1], *(level.turned for level in levels))
        return Attention(shape, levels[0].values, levels[0].grids, by_head[-1], output, turned, moved, made)

    def _levels(self, samples: Sequence[str]) -> list[_Level]:
        """Return the inputs of each level's samples; empty if they do not match, or are not of one attention."""
        found = [self._level(name, number) for number, name in enumerate(samples)]
        levels = [level for level in found if level is not None]
        one_attention = len({(level.values, level.grids) for level in levels}) == 1
        return levels if one_attention and len(levels) == len(samples) else []

    def _shape(self, levels: Sequence[_Level]) -> Shape | None:
        """Return the sizes of an attention; None if they contradict each other or are dynamic."""
        _, pixels, heads, channels = self._sizes[levels[0].values]
        _, queries, _, _, points, _ = self._sizes[levels[0].grids]
        shape = Shape(tuple(level.size for level in levels), queries, heads, points, channels)
        return shape if pixels == shape.pixels and min(queries, heads, points, channels) >= 1 else None

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


def _bilinear_with_zeros(sampler: Any) -> bool:
    return (text(sampler, "mode"), text(sampler, "padding_mode")) == ("bilinear", "zeros") and not flag(
        sampler, "align_corners"
    )
