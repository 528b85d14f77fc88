"""The parts of an RT-DETR in a graph without names of layers: backbone, encoder, decoder and their attentions.

The query selection is the first top-k, the memory is the concatenation before it, and an attention is a softmax between
two matmuls without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.graph.name_scopes import is_of_level, module_of
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import ACTIVATIONS, CONVOLUTIONS, TOP_K
from act_pipeline.graph.static_graph import StaticGraph

_MATMULS = ("matmul_v2", "matmul", "mul")
_RESHAPING = ("reshape2", "transpose2", "flatten_contiguous_range", "flatten2", "squeeze2", "unsqueeze2")
# Ops that may come between a projection and the product of queries and keys.
_PASSING = (*_RESHAPING, "scale", "elementwise_add", "elementwise_mul", "elementwise_div")


class LayerIndex(GraphIndex):
    """The ops of a graph, and its convolutions and matmuls with their weights.

    Attributes:
        weighted: the convolutions and matmuls, in order; a matmul may multiply two activations.
    """

    def __init__(self, graph: StaticGraph) -> None:
        """Index the ops of a graph, which is not changed."""
        super().__init__(graph.program.global_block().ops)
        self._graph = graph
        self._position = {id(op): index for index, op in enumerate(self.ops)}
        self.weighted = [op for op in self.ops if op.type in (*CONVOLUTIONS, *_MATMULS)]

    def at(self, op: Any) -> int:
        """Return the position of an op in the program."""
        return self._position[id(op)]

    def layer(self, op: Any) -> str:
        """Return the module stored in an op, or Paddle's name of the layer (``conv2d_12``), by its weight or output."""
        return module_of(op) or (self._weight(op) or op.output_arg_names[0]).split(".")[0]

    def has_weight(self, op: Any) -> bool:
        """Return whether an op of :attr:`weighted` reads a parameter."""
        return self._weight(op) is not None

    def weight_shape(self, op: Any) -> list[int]:
        """Return the shape of the weight of an op of :attr:`weighted`; empty without one."""
        name = self._weight(op)
        return list(self._graph.program.global_block().var(name).shape) if name else []

    def is_linear(self, op: Any) -> bool:
        """Return whether an op is a matmul with a weight; False for None."""
        return op is not None and op.type in _MATMULS and self.has_weight(op)

    def source(self, name: str, through: Sequence[str]) -> Any:
        """Return the op that produces a tensor, skipping ops of the types ``through`` by their input ``X``; or None."""
        return self.producer.get(self.origin(name, through))

    def linear_after(self, op: Any, through: Sequence[str]) -> Any:
        """Return the nearest linear layer that reads an op's output through ops of the types ``through``; or None."""
        return self.downstream(op.output_arg_names, self.is_linear, through)

    def _weight(self, op: Any) -> Optional[str]:
        names = op.input("Filter") if op.type in CONVOLUTIONS else [*op.input("X"), *op.input("Y")]
        return next((name for name in names if self._graph.is_parameter(name)), None)


@dataclass(frozen=True)
class Bounds:
    """Positions of the parts in the program, and the convolutions that project the levels between them.

    Attributes:
        encoder: index of the first op of the neck.
        memory: index of the first op of the decoder.
        selection: index of the first top-k.
        neck_projections: the projections of the backbone's levels, in order; those of finer levels may be missing.
        decoder_projections: the projections of the neck's levels, in order; empty if they are part of the layers that
            read the memory (`graph.memory_projections`).
        levels: number of the neck's levels.
    """

    encoder: int
    memory: int
    selection: int
    neck_projections: list[Any]
    decoder_projections: list[Any]
    levels: int


def find_bounds(index: LayerIndex) -> Optional[Bounds]:
    """Return where the parts of an RT-DETR begin; None if the graph is not one."""
    selection = next((at for at, op in enumerate(index.ops) if op.type in TOP_K), None)
    if selection is None:
        return None
    joined = _joined_projections(index, selection)
    attention = next((at for at, op in enumerate(index.ops[:selection]) if op.type == "softmax"), None)
    if not joined or attention is None:
        return None
    merged = [projections for projections in joined if all(map(is_of_level, projections))]
    memory = min(index.at(op) for projections in (merged or joined[-1:]) for op in projections)
    deepest = _deepest_projection(index, attention)
    if deepest is None or attention > memory:
        return None
    levels = len(joined[-1])
    neck_projections = _neck_projections(index, deepest, levels)
    projections = [] if merged else joined[-1]
    return Bounds(index.at(neck_projections[0]), memory, selection, neck_projections, projections, levels)


def _joined_projections(index: LayerIndex, selection: int) -> list[list[Any]]:
    """Return the projections that each concatenation of flattened levels consists of, the memory's last."""
    found = []
    for op in index.ops[:selection]:
        if op.type == "concat":
            projections = [_projection(index, name) for name in op.input("X")]
            if all(projections):
                found.append(projections)
    return found


def _deepest_projection(index: LayerIndex, attention: int) -> Any:
    """Return the projection of the deepest level, which, flattened, is the input of the first attention."""
    flatten = next((op for op in reversed(index.ops[:attention]) if op.type.startswith("flatten")), None)
    return _projection(index, flatten.input("X")[0]) if flatten is not None else None


def _neck_projections(index: LayerIndex, deepest: Any, levels: int) -> list[Any]:
    """Return the projections of the backbone's levels: the convolutions just before the deepest level's, and that.

    Those of finer levels may be missing: they can be part of other convolutions (`graph.neck_convolutions`).
    """
    before = [op for op in index.weighted if index.at(op) < index.at(deepest) and op.type == "conv2d"]
    projections = [*before[len(before) - levels + 1 :], deepest]
    width = index.weight_shape(deepest)[0]
    while index.weight_shape(projections[0])[0] != width or _is_activated(index, projections[0]):
        projections.pop(0)
    return projections


def _is_activated(index: LayerIndex, op: Any) -> bool:
    """Return whether an activation function reads an op's output, after its bias and a residual connection."""
    sums = ("elementwise_add", "batch_norm")
    return index.downstream(op.output_arg_names, lambda reader: reader.type in ACTIVATIONS, sums) is not None


def _projection(index: LayerIndex, name: str) -> Any:
    """Return the 1 x 1 convolution that a flattened level comes from; or None."""
    op = index.source(name, (*_RESHAPING, "elementwise_add", "batch_norm"))
    return op if op is not None and op.type == "conv2d" and index.weight_shape(op)[2:] == [1, 1] else None


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        ops: role (``q_proj``, ``k_proj``, ``v_proj``, ``qk``, ``av``, ``out_proj``) -> op; a projection of queries,
            keys or values may be missing.
    """

    ops: dict[str, Any]

    @property
    def last(self) -> Any:
        """The output projection."""
        return self.ops["out_proj"]


def attentions(index: LayerIndex, within: Sequence[Any]) -> Iterator[Attention]:
    """Yield the attentions whose products of queries and keys are among the ops ``within``, in order."""
    inside = set(map(id, within))
    for op in index.ops:
        if op.type == "softmax":
            product = index.source(op.input("X")[0], _PASSING)
            if product is not None and id(product) in inside and not index.has_weight(product):
                attention = _attention(index, product, op)
                if attention is not None:
                    yield attention


def _attention(index: LayerIndex, product: Any, softmax: Any) -> Optional[Attention]:
    """Return the attention of a product of queries and keys and its softmax; None if it has no output projection."""
    weighted = index.downstream(softmax.output_arg_names, lambda op: op.type in _MATMULS, ("dropout",))
    output = index.linear_after(weighted, _RESHAPING) if weighted is not None else None
    if output is None:
        return None
    inputs = {"q_proj": product.input("X")[0], "k_proj": product.input("Y")[0], "v_proj": weighted.input("Y")[0]}
    sources = {role: index.source(name, _PASSING) for role, name in inputs.items()}
    projections = {role: op for role, op in sources.items() if index.is_linear(op)}
    return Attention({"qk": product, "av": weighted, "out_proj": output, **projections})
