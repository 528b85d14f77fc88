"""Groups of ops that share an activation and its factors: the matmuls after a LayerNorm; and factors are applied.

If all readers of a LayerNorm are matmuls, the factors are folded into its gamma and beta and cost nothing. RT-DETR is
post-norm: the residual connection reads the norm as well, and q and k read it after the position embedding is added. In
that case one multiplication by a constant is inserted before the matmuls that share the activation. The other groups,
whose factors are folded into a convolution or matmul, are found by :mod:`act_pipeline.compress.smooth_quant.pairs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph

MATMUL = "matmul_v2"
# Ops that only move values: the output has exactly the values of the input.
MOVERS = ("transpose2", "reshape2", "flatten_contiguous_range", "squeeze2", "unsqueeze2", "assign")
# Ops that do not mix channels: outliers of the input are in the same channels of the output.
_KEEPERS = (*MOVERS, "elementwise_add", "elementwise_sub", "gather_nd", "slice", "scale", "dropout")


@dataclass(frozen=True)
class Reader:
    """An op with a weight that reads the channels of a group.

    Attributes:
        op: its output.
        weight: name of the weight: [out, channels, kh, kw] of a convolution, [channels, 1, kh, kw] of a depthwise one,
            [channels, out] of a matmul, or [out, channels] if ``transposed``.
        transposed: ``trans_y`` of a matmul.
        depthwise: whether each output channel reads one input channel.
        first: index of the first of the group's channels among those that the op reads; above 0 after a concat.
    """

    op: str
    weight: str
    transposed: bool = False
    depthwise: bool = False
    first: int = 0

    def axis(self, weight: np.ndarray) -> int:
        """Return the axis of the weight's input channels."""
        return 1 if self.transposed or (weight.ndim == 4 and not self.depthwise) else 0


@dataclass(frozen=True)
class SmoothGroup:
    """Ops that share an activation and therefore their factors.

    Attributes:
        activation: the tensor whose channels are scaled, and sampled; if ``folds``, everything between ``source`` and
            the readers is scaled.
        axis: the axis of its channels: 1 for convolutions, else -1.
        source: output of the LayerNorm, convolution or matmul that the activation comes from; None if there is none
            (``smooth_all_linears``).
        divided: the parameters of ``source`` that the factors are folded into -> the axis of the channels, or None for
            one value for each channel in any shape; empty: an op has to be inserted before the readers.
        readers: the ops.
        channels: the number of channels of the activation.
    """

    activation: str
    axis: int
    source: str | None
    divided: Mapping[str, int | None]
    readers: tuple[Reader, ...]
    channels: int

    @property
    def folds(self) -> bool:
        """Whether the factors can be folded into ``source``, so that they cost nothing at inference."""
        return bool(self.divided)

    @property
    def ops(self) -> tuple[str, ...]:
        """Output of each reader."""
        return tuple(reader.op for reader in self.readers)


class ChannelIndex(GraphIndex):
    """The ops of a graph, with what is asked about channels."""

    def __init__(self, graph: StaticGraph) -> None:
        self.graph = graph
        self.block = graph.program.global_block()
        others = (op for block in graph.program.blocks if block.idx != self.block.idx for op in block.ops)
        super().__init__([*others, *self.block.ops])
        self.outputs = {target.name for target in graph.fetch_targets}

    def channels(self, name: str) -> int:
        """Return the size of a tensor's last axis; -1 if it is unknown."""
        shape: Sequence[int] = self.block.var(name).shape if self.block.has_var(name) else ()
        return int(shape[-1]) if len(shape) else -1

    def keeps_channels(self, op: Any, source: str, output: str) -> bool:
        """Return whether channel j (last axis) of an op's input is channel j of its output."""
        rank = len(self.block.var(source).shape)
        if self.channels(source) != self.channels(output) or self.channels(source) < 1:
            return False
        if op.type == "transpose2":
            return list(op.attr("axis"))[-1] == rank - 1
        if op.type == "slice":
            return rank - 1 not in list(op.attr("axes"))
        if op.type == "gather_nd":
            return source == op.input("X")[0] and self.channels(op.input("Index")[0]) < rank
        return op.type != "scale" or op.attr("bias") == 0

    def norm_before(self, name: str, seen: set[str] | None = None) -> str | None:
        """Return the output of the LayerNorm over channels that a tensor comes from; None if there is none.

        Only ops that do not mix channels may be between the two.
        """
        seen = set() if seen is None else seen
        op = self.producer.get(name)
        if op is None or name in seen:
            return None
        seen.add(name)
        if op.type == "layer_norm":
            last = len(self.block.var(op.input("X")[0]).shape) - 1
            return name if name == op.output("Y")[0] and int(op.attr("begin_norm_axis")) == last else None
        if op.type not in _KEEPERS:
            return None
        for slot in ("X", "Y"):
            for source in op.input(slot) if slot in op.input_names else ():
                if not self.graph.is_parameter(source) and self.keeps_channels(op, source, name):
                    found = self.norm_before(source, seen)
                    if found is not None:
                        return found
        return None

    def leaves(self, name: str) -> list[Any] | None:
        """Return the matmuls that read a tensor, directly or through ops that only move values.

        None if an op of another type reads it, or if it is an output of the graph.
        """
        if name in self.outputs:
            return None
        found: list[Any] = []
        for op in self.readers.get(name, ()):
            if op.type == MATMUL:
                found.append(op)
            elif op.type in MOVERS and self.keeps_channels(op, name, op.output("Out")[0]):
                further = self.leaves(op.output("Out")[0])
                if further is None:
                    return None
                found += further
            else:
                return None
        return found


def find_groups(
    graph: StaticGraph, smooth_all_linears: bool = False, exclude: Collection[str] = ()
) -> list[SmoothGroup]:
    """Return the matmuls that can be smoothed, grouped by the activation that they share, in the order of the graph.

    A ``matmul_v2`` can be smoothed if its ``Y`` is a 2-D float32 weight that no other op reads, and its ``X`` comes
    from a LayerNorm over the channels, directly or through ops that do not mix channels (addition of a position
    embedding, reshape, gather).

    Args:
        graph: a float graph with folded constants.
        smooth_all_linears: also include matmuls that do not follow a LayerNorm (PaddleSlim's name); each such
            activation costs one multiplication.
        exclude: outputs of matmuls that stay float and are not smoothed.
    """
    channel_index = ChannelIndex(graph)
    shared: dict[str, list[Any]] = {}
    for op in channel_index.block.ops:
        if op.type == MATMUL and op.output("Out")[0] not in exclude and _can_be_smoothed(channel_index, op):
            shared.setdefault(op.input("X")[0], []).append(op)
    groups: list[SmoothGroup] = []
    folded: set[str] = set()
    for activation, ops in shared.items():
        if activation in folded:
            continue
        norm = channel_index.norm_before(activation)
        if norm is None and not smooth_all_linears:
            continue
        source, divided = activation, dict[str, Optional[int]]()
        if norm is not None and _affine(channel_index, norm):
            leaves = channel_index.leaves(norm)
            # All of the norm's readers, whatever moves stand between, or none.
            if leaves is not None and all(
                any(leaf is op for op in shared.get(leaf.input("X")[0], ())) for leaf in leaves
            ):
                source, divided, ops = norm, _affine(channel_index, norm), leaves
                folded.update(op.input("X")[0] for op in ops)
        readers = tuple(Reader(op.output("Out")[0], op.input("Y")[0], bool(op.attr("trans_y"))) for op in ops)
        groups.append(SmoothGroup(source, -1, norm, divided, readers, channel_index.channels(activation)))
    return groups


def _can_be_smoothed(channel_index: ChannelIndex, op: Any) -> bool:
    activation, weight = op.input("X")[0], op.input("Y")[0]
    graph = channel_index.graph
    if graph.is_parameter(activation) or not graph.is_parameter(weight) or op.attr("trans_x"):
        return False
    shape = channel_index.block.var(weight).shape
    if len(shape) != 2 or len(channel_index.readers[weight]) != 1 or graph.parameter(weight).dtype != np.float32:
        return False
    return channel_index.channels(activation) == shape[1 if op.attr("trans_y") else 0]


def _affine(channel_index: ChannelIndex, norm: str) -> dict[str, int | None]:
    """Return gamma and beta of a LayerNorm, as :attr:`SmoothGroup.divided`; empty if another op reads them too."""
    op = channel_index.producer[norm]
    names = [op.input(slot)[0] for slot in ("Scale", "Bias") if slot in op.input_names and op.input(slot)]
    owned = all(len(channel_index.readers[name]) == 1 and channel_index.graph.is_parameter(name) for name in names)
    return dict.fromkeys(names) if len(names) == 2 and owned else {}


def input_weights(weight: np.ndarray, reader: Reader, channels: int) -> np.ndarray:
    """Return the part of a reader's weight that multiplies a group's channels.

    Args:
        weight: the whole weight.
        reader: its layout.
        channels: the number of channels of the group.

    Returns:
        [groups, channels / groups, out / groups, positions of the kernel]: one group, or as many as ``channels`` for a
        depthwise convolution; a matmul has one position. The positions of an output channel share an INT8 scale.
    """
    axis = reader.axis(weight)
    part = np.take(weight, range(reader.first, reader.first + channels), axis)
    if reader.depthwise:
        return part.reshape(channels, 1, 1, -1)
    part = np.moveaxis(part, axis, 0)  # [channels, out, ...]
    return part.reshape(1, channels, part.shape[1], -1)


@dataclass(frozen=True)
class DividedTensor:
    """A tensor whose channels are divided by factors in a smoothed graph.

    Attributes:
        by: float32 [channels]; 1 for channels that stay as they are.
        axis: the axis of the channels.
    """

    by: np.ndarray
    axis: int


def divided_tensors(
    graph: StaticGraph, groups: Sequence[SmoothGroup], factors: Mapping[str, np.ndarray]
) -> dict[str, DividedTensor]:
    """Return the tensors that are divided where factors are folded, by name; all others keep their values.

    Args:
        graph: the graph that the groups were found in.
        groups: the groups; those without factors, or that do not fold, divide no tensor that ``graph`` has.
        factors: activation of a group -> its factors, float32 [channels].
    """
    index = ChannelIndex(graph)
    found: dict[str, DividedTensor] = {}
    for group in groups:
        if not group.folds or group.source is None or group.activation not in factors:
            continue
        reached = [(group.source, 0)]
        while reached:
            name, first = reached.pop()
            size = int(index.block.var(name).shape[group.axis])
            tensor = found.setdefault(name, DividedTensor(np.ones(size, np.float32), group.axis))
            tensor.by[first : first + group.channels] = factors[group.activation]
            for op in index.readers.get(name, ()):
                if op.output_arg_names[0] in group.ops:
                    continue
                before = 0
                if op.type == "concat":
                    names = op.input("X")
                    before = sum(int(index.block.var(x).shape[group.axis]) for x in names[: names.index(name)])
                reached.append((op.output("Out")[0], first + before))
    return found


def apply_factors(graph: StaticGraph, group: SmoothGroup, factors: np.ndarray) -> None:
    """Divide a group's activation by factors, and multiply the input channels of its weights by them.

    Args:
        graph: the float graph. Parameters are changed, and one ``elementwise_mul`` is inserted if the group does not
            fold.
        group: a group of :func:`find_groups` or of :func:`act_pipeline.compress.smooth_quant.pairs.find_pairs` on this
            graph.
        factors: float32 [channels]; with powers of two the results of the graph are identical bit by bit.
    """
    inverse = (1 / factors).astype(np.float32)
    for reader in group.readers:
        weight = graph.parameter(reader.weight)
        axis = reader.axis(weight)
        scales = np.ones(weight.shape[axis], np.float32)
        scales[reader.first : reader.first + group.channels] = factors
        graph.set_parameter(reader.weight, _scaled(weight, scales, axis))
    for name, divided_axis in group.divided.items():
        graph.set_parameter(name, _scaled(graph.parameter(name), inverse, divided_axis))
    if not group.folds:
        _insert_division(graph, group, inverse)


def _scaled(value: np.ndarray, scales: np.ndarray, axis: int | None) -> np.ndarray:
    """Return a parameter with the channels of an axis scaled; None: it has one value for each channel."""
    if axis is None:
        return (value.reshape(-1) * scales).reshape(value.shape)
    shape = [1] * value.ndim
    shape[axis] = -1
    return value * scales.reshape(shape)


def _insert_division(graph: StaticGraph, group: SmoothGroup, inverse: np.ndarray) -> None:
    block = graph.program.global_block()
    readers = [op for op in block.ops if op.type == MATMUL and op.output("Out")[0] in group.ops]
    like = block.var(group.activation)
    scale = graph.add_parameter(f"{group.activation}.smoothing", inverse)
    made = block.create_var(
        name=f"{group.activation}.smoothed", shape=like.shape, dtype=like.dtype, stop_gradient=like.stop_gradient
    )
    before = Inserter(block, block.ops.index(readers[0]))
    before.add("elementwise_mul", {"X": like, "Y": scale}, {"Out": made}, axis=-1)
    for op in readers:
        op.desc.set_input("X", [made.name])
