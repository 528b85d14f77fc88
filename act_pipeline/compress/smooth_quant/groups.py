"""Find the matmuls that SmoothQuant can smooth, and apply their factors.

If all readers of a LayerNorm are matmuls, the factors are folded into its gamma and beta and cost nothing. RT-DETR is
post-norm: the residual connection reads the norm as well, and q and k read it after the position embedding is added. In
that case one multiplication by a constant is inserted before the matmuls that share the activation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph

_MATMUL = "matmul_v2"
# Ops that only move values: the output has exactly the values of the input.
_MOVERS = ("transpose2", "reshape2", "flatten_contiguous_range", "squeeze2", "unsqueeze2", "assign")
# Ops that do not mix channels: outliers of the input are in the same channels of the output.
_KEEPERS = (*_MOVERS, "elementwise_add", "elementwise_sub", "gather_nd", "slice", "scale", "dropout")


@dataclass(frozen=True)
class SmoothGroup:
    """Matmuls that share an activation and therefore their factors.

    Attributes:
        activation: the tensor whose channels (last axis) are scaled; if ``folds``, the LayerNorm's output.
        layer_norm: output of the LayerNorm that the activation comes from; None if there is none
            (``smooth_all_linears``).
        folds: whether the factors can be folded into the gamma and beta of that LayerNorm.
        matmuls: output of each matmul.
        weights: name of each matmul's weight, [channels, out], or [out, channels] if ``transposed``.
        transposed: ``trans_y`` of each matmul.
        channels: the number of channels of the activation.
    """

    activation: str
    layer_norm: str | None
    folds: bool
    matmuls: tuple[str, ...]
    weights: tuple[str, ...]
    transposed: tuple[bool, ...]
    channels: int


class _ChannelIndex(GraphIndex):
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
            if op.type == _MATMUL:
                found.append(op)
            elif op.type in _MOVERS and self.keeps_channels(op, name, op.output("Out")[0]):
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
    channel_index = _ChannelIndex(graph)
    shared: dict[str, list[Any]] = {}
    for op in channel_index.block.ops:
        if op.type == _MATMUL and op.output("Out")[0] not in exclude and _can_be_smoothed(channel_index, op):
            shared.setdefault(op.input("X")[0], []).append(op)
    groups: list[SmoothGroup] = []
    folded: set[str] = set()
    for activation, ops in shared.items():
        if activation in folded:
            continue
        norm = channel_index.norm_before(activation)
        if norm is None and not smooth_all_linears:
            continue
        source, folds = activation, False
        if norm is not None and _has_own_affine(channel_index, norm):
            leaves = channel_index.leaves(norm)
            # All of the norm's readers, whatever moves stand between, or none.
            if leaves is not None and all(
                any(leaf is op for op in shared.get(leaf.input("X")[0], ())) for leaf in leaves
            ):
                source, folds, ops = norm, True, leaves
                folded.update(op.input("X")[0] for op in ops)
        groups.append(
            SmoothGroup(
                source,
                norm,
                folds,
                tuple(op.output("Out")[0] for op in ops),
                tuple(op.input("Y")[0] for op in ops),
                tuple(bool(op.attr("trans_y")) for op in ops),
                channel_index.channels(activation),
            )
        )
    return groups


def _can_be_smoothed(channel_index: _ChannelIndex, op: Any) -> bool:
    activation, weight = op.input("X")[0], op.input("Y")[0]
    graph = channel_index.graph
    if graph.is_parameter(activation) or not graph.is_parameter(weight) or op.attr("trans_x"):
        return False
    shape = channel_index.block.var(weight).shape
    if len(shape) != 2 or len(channel_index.readers[weight]) != 1 or graph.parameter(weight).dtype != np.float32:
        return False
    return channel_index.channels(activation) == shape[1 if op.attr("trans_y") else 0]


def _has_own_affine(channel_index: _ChannelIndex, norm: str) -> bool:
    op = channel_index.producer[norm]
    names = [op.input(slot)[0] for slot in ("Scale", "Bias") if slot in op.input_names and op.input(slot)]
    return len(names) == 2 and all(
        len(channel_index.readers[name]) == 1 and channel_index.graph.is_parameter(name) for name in names
    )


def apply_factors(graph: StaticGraph, group: SmoothGroup, factors: np.ndarray) -> None:
    """Divide a group's activation by factors, and multiply the input channels of its weights by them.

    Args:
        graph: the float graph. Parameters are changed, and one ``elementwise_mul`` is inserted if the group does not
            fold.
        group: a group of :func:`find_groups` on this graph.
        factors: float32 [channels]; with powers of two the results of the graph are identical bit by bit.
    """
    block = graph.program.global_block()
    inverse = (1 / factors).astype(np.float32)
    for name, transposed in zip(group.weights, group.transposed):
        weight = graph.parameter(name)
        graph.set_parameter(name, weight * (factors[None, :] if transposed else factors[:, None]))
    if group.folds:
        norm = next(op for op in block.ops if group.layer_norm in op.output_arg_names)
        for name in (norm.input("Scale")[0], norm.input("Bias")[0]):
            graph.set_parameter(name, graph.parameter(name) * inverse)
        return
    readers = [op for op in block.ops if op.type == _MATMUL and op.output("Out")[0] in group.matmuls]
    like = block.var(group.activation)
    scale = graph.add_parameter(f"{group.activation}.smoothing", inverse)
    made = block.create_var(
        name=f"{group.activation}.smoothed", shape=like.shape, dtype=like.dtype, stop_gradient=like.stop_gradient
    )
    before = Inserter(block, block.ops.index(readers[0]))
    before.add("elementwise_mul", {"X": like, "Y": scale}, {"Out": made}, axis=-1)
    for op in readers:
        op.desc.set_input("X", [made.name])
