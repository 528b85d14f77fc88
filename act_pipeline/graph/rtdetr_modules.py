"""PaddleDetection's module names for the ops of an RT-DETR, inferred from the structure of the graph.

A static graph does not contain the names of its layers; its weights are called ``conv2d_12.w_0``. RT-DETR's structure
identifies the parts: the query selection is the first top-k, the memory is the concatenation before it, and an
attention is a softmax between two matmuls without weights. The ops between these are in the order in which
PaddleDetection's ``HybridEncoder`` and ``RTDETRTransformer`` compute them. So ops get PaddleDetection's module names
(``transformer.decoder.layers.0.self_attn.q_proj``), for models of any exporter. Where a part is not recognized, its ops
are named after their weights (``neck.conv2d_45``). In a graph that is not an RT-DETR, this holds for all ops
(``model.conv2d_3``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.static_graph import StaticGraph

GROUPS = ("backbone", "encoder", "decoder", "head")
OTHER_GROUP = "model"
_MATMULS = ("matmul_v2", "matmul", "mul")
_RESHAPING = ("reshape2", "transpose2", "flatten_contiguous_range", "flatten2", "squeeze2", "unsqueeze2")
# Ops that may come between a projection and the product of queries and keys.
_PASSING = (*_RESHAPING, "scale", "elementwise_add", "elementwise_mul", "elementwise_div")
_AFTER_SELF_ATTENTION = (
    "cross_attn.value_proj",
    "cross_attn.sampling_offsets",
    "cross_attn.attention_weights",
    "cross_attn.output_proj",
    "linear1",
    "linear2",
)
_BOX = 4


@dataclass(frozen=True)
class Place:
    """The module that an op belongs to.

    Attributes:
        module: dotted module name.
        group: one of :data:`GROUPS`, or ``model``.
    """

    module: str
    group: str


def find_places(graph: StaticGraph) -> dict[str, Place]:
    """Return the module of every convolution and matmul.

    Args:
        graph: a float graph with folded constants (:func:`act_pipeline.graph.folding.fold_constants`).

    Returns:
        Name of the op's first output -> its module and group.
    """
    graph_index = _LayerIndex(graph)
    bounds = _find_bounds(graph_index)
    if bounds is None:
        return {
            op.output_arg_names[0]: Place(f"model.{graph_index.layer(op)}", OTHER_GROUP) for op in graph_index.weighted
        }
    names: dict[int, str] = {}
    for index, op in enumerate(bounds.neck_projections):
        names[id(op)] = f"neck.input_proj.{index}"
    for index, op in enumerate(bounds.decoder_projections):
        names[id(op)] = f"transformer.input_proj.{index}"
    encoder = [op for op in graph_index.weighted if bounds.encoder <= graph_index.position[id(op)] < bounds.memory]
    _name_encoder_layers(graph_index, encoder, names)
    _name_decoder(
        graph_index, [op for op in graph_index.weighted if graph_index.position[id(op)] > bounds.memory], bounds, names
    )
    places = {}
    for op in graph_index.weighted:
        at = graph_index.position[id(op)]
        part = "backbone" if at < bounds.encoder else "neck" if at < bounds.memory else "transformer"
        module = names.get(id(op)) or f"{part}.{graph_index.layer(op)}"
        places[op.output_arg_names[0]] = Place(module, _group(module))
    return places


def _group(module: str) -> str:
    if module.startswith("backbone."):
        return "backbone"
    if module.startswith("neck."):
        return "encoder"
    return "head" if "_head." in module and "query_pos_head" not in module else "decoder"


class _LayerIndex(GraphIndex):
    """The ops of a graph, with what is asked about layers."""

    def __init__(self, graph: StaticGraph) -> None:
        super().__init__(graph.program.global_block().ops)
        self.graph = graph
        self.position = {id(op): index for index, op in enumerate(self.ops)}
        self.weighted = [op for op in self.ops if op.type in (*CONVOLUTIONS, *_MATMULS)]

    def weight(self, op: Any) -> Optional[str]:
        names = op.input("Filter") if op.type in CONVOLUTIONS else [*op.input("X"), *op.input("Y")]
        return next((name for name in names if self.graph.is_parameter(name)), None)

    def layer(self, op: Any) -> str:
        """Return Paddle's name of the layer (``conv2d_12``), from its weight, or else from its output."""
        return (self.weight(op) or op.output_arg_names[0]).split(".")[0]

    def shape(self, name: Optional[str]) -> list[int]:
        return list(self.graph.program.global_block().var(name).shape) if name else []

    def source(self, name: str, through: Sequence[str]) -> Any:
        """Return the op that produces a tensor, skipping ops of the types ``through`` by their input ``X``."""
        op = self.producer.get(name)
        while op is not None and op.type in through:
            op = self.producer.get(op.input("X")[0])
        return op

    def target(self, op: Any, wanted: Callable[[Any], bool], through: Sequence[str]) -> Any:
        """Return the nearest wanted op after ``op`` that is reached through ops of the types ``through`` only."""
        ahead, seen = [op], set()
        while ahead:
            for name in ahead.pop(0).output_arg_names:
                for reader in self.readers.get(name, ()):
                    if wanted(reader):
                        return reader
                    if reader.type in through and id(reader) not in seen:
                        seen.add(id(reader))
                        ahead.append(reader)
        return None

    def is_linear(self, op: Any) -> bool:
        return op is not None and op.type in _MATMULS and self.weight(op) is not None


@dataclass(frozen=True)
class _Bounds:
    """Positions of the parts in the program, and the convolutions that project the levels between them.

    Attributes:
        encoder: index of the first op of the neck.
        memory: index of the first op of the decoder.
        selection: index of the first top-k.
        neck_projections: the projections of the backbone's levels, in order.
        decoder_projections: the projections of the neck's levels, in order.
    """

    encoder: int
    memory: int
    selection: int
    neck_projections: list[Any]
    decoder_projections: list[Any]


def _find_bounds(graph_index: _LayerIndex) -> Optional[_Bounds]:
    selection = next((index for index, op in enumerate(graph_index.ops) if op.type in ("top_k_v2", "top_k")), None)
    if selection is None:
        return None
    projections: list[Any] = []
    for op in graph_index.ops[:selection]:
        if op.type == "concat":
            found = [_projection(graph_index, name) for name in op.input("X")]
            if all(found):
                projections = found
    attention = next((op for op in graph_index.ops[:selection] if op.type == "softmax"), None)
    if not projections or attention is None:
        return None
    memory = min(graph_index.position[id(op)] for op in projections)
    # The deepest level's projection, flattened, is what the first attention sees; the other levels' stand before it.
    start = graph_index.position[id(attention)]
    flatten = next((op for op in reversed(graph_index.ops[:start]) if op.type.startswith("flatten")), None)
    deepest = _projection(graph_index, flatten.input("X")[0]) if flatten is not None else None
    if deepest is None or start > memory:
        return None
    before = [
        op
        for op in graph_index.weighted
        if graph_index.position[id(op)] < graph_index.position[id(deepest)] and op.type == "conv2d"
    ]
    neck = [*before[len(before) - len(projections) + 1 :], deepest]
    width = graph_index.shape(graph_index.weight(deepest))[0]
    while neck and graph_index.shape(graph_index.weight(neck[0]))[0] != width:
        neck.pop(0)
    return _Bounds(graph_index.position[id(neck[0])], memory, selection, neck, projections)


def _projection(graph_index: _LayerIndex, name: str) -> Any:
    """Return the 1 x 1 convolution that a flattened level comes from."""
    op = graph_index.source(name, (*_RESHAPING, "elementwise_add", "batch_norm"))
    weight = graph_index.weight(op) if op is not None and op.type == "conv2d" else None
    return op if weight is not None and graph_index.shape(weight)[2:] == [1, 1] else None


@dataclass(frozen=True)
class _Attention:
    """The ops of an attention by role (``q_proj``, ``qk``, ...); a projection may be missing."""

    ops: dict[str, Any]

    @property
    def last(self) -> Any:
        return self.ops["out_proj"]


def _attentions(graph_index: _LayerIndex, within: Sequence[Any]) -> Iterator[_Attention]:
    inside = {id(op) for op in within}
    for op in graph_index.ops:
        if op.type != "softmax":
            continue
        product = graph_index.source(op.input("X")[0], _PASSING)
        if product is None or id(product) not in inside or graph_index.weight(product) is not None:
            continue
        weighted = graph_index.target(op, lambda reader: reader.type in _MATMULS, ("dropout",))
        projection = graph_index.target(weighted, graph_index.is_linear, _RESHAPING) if weighted is not None else None
        if projection is None:
            continue
        roles = {"qk": product, "av": weighted, "out_proj": projection}
        for role, name in (
            ("q_proj", product.input("X")[0]),
            ("k_proj", product.input("Y")[0]),
            ("v_proj", weighted.input("Y")[0]),
        ):
            found = graph_index.source(name, _PASSING)
            if graph_index.is_linear(found):
                roles[role] = found
        yield _Attention(roles)


def _name_encoder_layers(graph_index: _LayerIndex, within: Sequence[Any], names: dict[int, str]) -> None:
    for index, attention in enumerate(_attentions(graph_index, within)):
        prefix = f"neck.encoder.{index}.layers.0"
        names.update({id(op): f"{prefix}.self_attn.{role}" for role, op in attention.ops.items()})
        at = graph_index.position[id(attention.last)]
        feed_forward = [op for op in within if graph_index.position[id(op)] > at and graph_index.is_linear(op)][:2]
        names.update({id(op): f"{prefix}.linear{number}" for number, op in enumerate(feed_forward, 1)})


def _name_decoder(graph_index: _LayerIndex, within: Sequence[Any], bounds: _Bounds, names: dict[int, str]) -> None:
    linear = [op for op in within if graph_index.is_linear(op)]
    selecting = [op for op in linear if graph_index.position[id(op)] < bounds.selection]
    boxes = [_chain(graph_index, op) for op in linear if graph_index.shape(graph_index.weight(op))[-1] == _BOX]
    for op in selecting:
        names[id(op)] = "transformer.enc_score_head.0"
    if selecting:
        names[id(selecting[0])] = "transformer.enc_output.0"
    layer = 0
    for chain in boxes:
        head = "enc_bbox_head"
        if graph_index.position[id(chain[-1])] > bounds.selection:
            head, layer = f"dec_bbox_head.{layer}", layer + 1
        names.update({id(op): f"transformer.{head}.layers.{index}" for index, op in enumerate(chain)})
    for op in linear:
        if graph_index.shape(graph_index.weight(op))[0] == _BOX:
            names[id(op)] = "transformer.query_pos_head.layers.0"
            second = graph_index.target(op, graph_index.is_linear, ("elementwise_add", "relu"))
            names.update({id(second): "transformer.query_pos_head.layers.1"} if second is not None else {})
    attentions = list(_attentions(graph_index, within))
    starts = [graph_index.position[id(attention.last)] for attention in attentions]
    for index, attention in enumerate(attentions):
        prefix = f"transformer.decoder.layers.{index}"
        names.update({id(op): f"{prefix}.self_attn.{role}" for role, op in attention.ops.items()})
    for index, start in enumerate(starts):
        prefix = f"transformer.decoder.layers.{index}"
        end = starts[index + 1] if index + 1 < len(starts) else len(graph_index.ops)
        left = [op for op in linear if start < graph_index.position[id(op)] < end and id(op) not in names]
        for role, op in zip(_AFTER_SELF_ATTENTION, left):
            names[id(op)] = f"{prefix}.{role}"
        for op in left[len(_AFTER_SELF_ATTENTION) :]:
            names[id(op)] = f"transformer.dec_score_head.{index}"


def _chain(graph_index: _LayerIndex, last: Any) -> list[Any]:
    """Return a box head's linear layers, ``last`` the last, joined by ReLUs."""
    chain = [last]
    while True:
        relu = graph_index.producer.get(chain[0].input("X")[0])
        before = (
            graph_index.source(relu.input("X")[0], ("elementwise_add",))
            if relu is not None and relu.type == "relu"
            else None
        )
        if not graph_index.is_linear(before):
            return chain
        chain.insert(0, before)
