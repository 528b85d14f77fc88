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

from act_pipeline.graph.static_graph import StaticGraph

GROUPS = ("backbone", "encoder", "decoder", "head")
OTHER_GROUP = "model"
_CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
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
    wires = _Wires(graph)
    bounds = _find_bounds(wires)
    if bounds is None:
        return {op.output_arg_names[0]: Place(f"model.{wires.layer(op)}", OTHER_GROUP) for op in wires.weighted}
    names: dict[int, str] = {}
    for index, op in enumerate(bounds.neck_projections):
        names[id(op)] = f"neck.input_proj.{index}"
    for index, op in enumerate(bounds.decoder_projections):
        names[id(op)] = f"transformer.input_proj.{index}"
    encoder = [op for op in wires.weighted if bounds.encoder <= wires.position[id(op)] < bounds.memory]
    _name_encoder_layers(wires, encoder, names)
    _name_decoder(wires, [op for op in wires.weighted if wires.position[id(op)] > bounds.memory], bounds, names)
    places = {}
    for op in wires.weighted:
        at = wires.position[id(op)]
        part = "backbone" if at < bounds.encoder else "neck" if at < bounds.memory else "transformer"
        module = names.get(id(op)) or f"{part}.{wires.layer(op)}"
        places[op.output_arg_names[0]] = Place(module, _group(module))
    return places


def _group(module: str) -> str:
    if module.startswith("backbone."):
        return "backbone"
    if module.startswith("neck."):
        return "encoder"
    return "head" if "_head." in module and "query_pos_head" not in module else "decoder"


class _Wires:
    """The ops of a graph, with the producer and the readers of every tensor."""

    def __init__(self, graph: StaticGraph) -> None:
        self.graph = graph
        self.ops = list(graph.program.global_block().ops)
        self.position = {id(op): index for index, op in enumerate(self.ops)}
        self.producer = {name: op for op in self.ops for name in op.output_arg_names}
        self.readers: dict[str, list[Any]] = {}
        for op in self.ops:
            for name in op.input_arg_names:
                self.readers.setdefault(name, []).append(op)
        self.weighted = [op for op in self.ops if op.type in (*_CONVOLUTIONS, *_MATMULS)]

    def weight(self, op: Any) -> Optional[str]:
        names = op.input("Filter") if op.type in _CONVOLUTIONS else [*op.input("X"), *op.input("Y")]
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


def _find_bounds(wires: _Wires) -> Optional[_Bounds]:
    selection = next((index for index, op in enumerate(wires.ops) if op.type in ("top_k_v2", "top_k")), None)
    if selection is None:
        return None
    projections: list[Any] = []
    for op in wires.ops[:selection]:
        if op.type == "concat":
            found = [_projection(wires, name) for name in op.input("X")]
            if all(found):
                projections = found
    attention = next((op for op in wires.ops[:selection] if op.type == "softmax"), None)
    if not projections or attention is None:
        return None
    memory = min(wires.position[id(op)] for op in projections)
    # The first attention reads the flattened projection of the deepest level; the other projections precede it.
    start = wires.position[id(attention)]
    flatten = next((op for op in reversed(wires.ops[:start]) if op.type.startswith("flatten")), None)
    deepest = _projection(wires, flatten.input("X")[0]) if flatten is not None else None
    if deepest is None or start > memory:
        return None
    before = [
        op for op in wires.weighted if wires.position[id(op)] < wires.position[id(deepest)] and op.type == "conv2d"
    ]
    neck = [*before[len(before) - len(projections) + 1 :], deepest]
    width = wires.shape(wires.weight(deepest))[0]
    while neck and wires.shape(wires.weight(neck[0]))[0] != width:
        neck.pop(0)
    return _Bounds(wires.position[id(neck[0])], memory, selection, neck, projections)


def _projection(wires: _Wires, name: str) -> Any:
    """Return the 1 x 1 convolution that produces a flattened level, or None."""
    op = wires.source(name, (*_RESHAPING, "elementwise_add", "batch_norm"))
    weight = wires.weight(op) if op is not None and op.type == "conv2d" else None
    return op if weight is not None and wires.shape(weight)[2:] == [1, 1] else None


@dataclass(frozen=True)
class _Attention:
    """The ops of an attention by role (``q_proj``, ``qk``, ...); a projection may be missing."""

    ops: dict[str, Any]

    @property
    def last(self) -> Any:
        return self.ops["out_proj"]


def _attentions(wires: _Wires, within: Sequence[Any]) -> Iterator[_Attention]:
    inside = {id(op) for op in within}
    for op in wires.ops:
        if op.type != "softmax":
            continue
        product = wires.source(op.input("X")[0], _PASSING)
        if product is None or id(product) not in inside or wires.weight(product) is not None:
            continue
        weighted = wires.target(op, lambda reader: reader.type in _MATMULS, ("dropout",))
        projection = wires.target(weighted, wires.is_linear, _RESHAPING) if weighted is not None else None
        if projection is None:
            continue
        roles = {"qk": product, "av": weighted, "out_proj": projection}
        for role, name in (
            ("q_proj", product.input("X")[0]),
            ("k_proj", product.input("Y")[0]),
            ("v_proj", weighted.input("Y")[0]),
        ):
            found = wires.source(name, _PASSING)
            if wires.is_linear(found):
                roles[role] = found
        yield _Attention(roles)


def _name_encoder_layers(wires: _Wires, within: Sequence[Any], names: dict[int, str]) -> None:
    for index, attention in enumerate(_attentions(wires, within)):
        prefix = f"neck.encoder.{index}.layers.0"
        names.update({id(op): f"{prefix}.self_attn.{role}" for role, op in attention.ops.items()})
        at = wires.position[id(attention.last)]
        feed_forward = [op for op in within if wires.position[id(op)] > at and wires.is_linear(op)][:2]
        names.update({id(op): f"{prefix}.linear{number}" for number, op in enumerate(feed_forward, 1)})


def _name_decoder(wires: _Wires, within: Sequence[Any], bounds: _Bounds, names: dict[int, str]) -> None:
    linear = [op for op in within if wires.is_linear(op)]
    selecting = [op for op in linear if wires.position[id(op)] < bounds.selection]
    boxes = [_chain(wires, op) for op in linear if wires.shape(wires.weight(op))[-1] == _BOX]
    for op in selecting:
        names[id(op)] = "transformer.enc_score_head.0"
    if selecting:
        names[id(selecting[0])] = "transformer.enc_output.0"
    layer = 0
    for chain in boxes:
        head = "enc_bbox_head"
        if wires.position[id(chain[-1])] > bounds.selection:
            head, layer = f"dec_bbox_head.{layer}", layer + 1
        names.update({id(op): f"transformer.{head}.layers.{index}" for index, op in enumerate(chain)})
    for op in linear:
        if wires.shape(wires.weight(op))[0] == _BOX:
            names[id(op)] = "transformer.query_pos_head.layers.0"
            second = wires.target(op, wires.is_linear, ("elementwise_add", "relu"))
            names.update({id(second): "transformer.query_pos_head.layers.1"} if second is not None else {})
    attentions = list(_attentions(wires, within))
    starts = [wires.position[id(attention.last)] for attention in attentions]
    for index, attention in enumerate(attentions):
        prefix = f"transformer.decoder.layers.{index}"
        names.update({id(op): f"{prefix}.self_attn.{role}" for role, op in attention.ops.items()})
    for index, start in enumerate(starts):
        prefix = f"transformer.decoder.layers.{index}"
        end = starts[index + 1] if index + 1 < len(starts) else len(wires.ops)
        left = [op for op in linear if start < wires.position[id(op)] < end and id(op) not in names]
        for role, op in zip(_AFTER_SELF_ATTENTION, left):
            names[id(op)] = f"{prefix}.{role}"
        for op in left[len(_AFTER_SELF_ATTENTION) :]:
            names[id(op)] = f"transformer.dec_score_head.{index}"


def _chain(wires: _Wires, last: Any) -> list[Any]:
    """Return the linear layers of a box head, connected by ReLUs, up to ``last``."""
    chain = [last]
    while True:
        relu = wires.producer.get(chain[0].input("X")[0])
        before = (
            wires.source(relu.input("X")[0], ("elementwise_add",)) if relu is not None and relu.type == "relu" else None
        )
        if not wires.is_linear(before):
            return chain
        chain.insert(0, before)
