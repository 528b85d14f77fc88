"""PaddleDetection's module names for the ops of an RT-DETR, inferred from the structure of the graph.

A static graph does not contain the names of its layers; its weights are called ``conv2d_12.w_0``. RT-DETR's structure
identifies the parts (`graph.rtdetr_structure`), and the ops in each are in the order in which PaddleDetection's
``HybridEncoder`` and ``RTDETRTransformer`` compute them. So ops get PaddleDetection's module names
(``transformer.decoder.layers.0.self_attn.q_proj``), for models of any exporter. Where a part is not recognized, its ops
are named after their weights (``neck.conv2d_45``). In a graph that is not an RT-DETR, this holds for all ops, in the
parts that `graph.towers` finds (``text.linear_3``, ``decoder.linear_80``), or without parts (``model.conv2d_3``); where
an imported file has the names of PyTorch modules, these are the names (`graph.name_scopes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from act_pipeline.graph.name_scopes import is_of_level, module_of
from act_pipeline.graph.rtdetr_structure import Attention, Bounds, LayerIndex, attentions, find_bounds
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.graph.towers import find_towers

GROUPS = ("backbone", "encoder", "decoder", "head")
OTHER_GROUP = "model"
_AFTER_SELF_ATTENTION = (
    "cross_attn.value_proj",
    "cross_attn.sampling_offsets",
    "cross_attn.attention_weights",
    "cross_attn.output_proj",
    "linear1",
    "linear2",
)
_BOX = 4
# id of an op -> its module name.
_Names = dict[int, str]


@dataclass(frozen=True)
class Place:
    """The module that an op belongs to.

    Attributes:
        module: dotted module name.
        group: one of :data:`GROUPS`, ``text``, or ``model``.
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
    index = LayerIndex(graph)
    bounds = find_bounds(index)
    if bounds is None:
        towers = find_towers(graph)
        places = {}
        for op in index.weighted:
            output = op.output_arg_names[0]
            group = towers.get(output, OTHER_GROUP)
            places[output] = Place(module_of(op) or f"{group}.{index.layer(op)}", group)
        return places
    names = {
        **_projection_names(bounds),
        **_encoder_names(index, [op for op in index.weighted if bounds.encoder <= index.at(op) < bounds.memory]),
        **_decoder_names(index, [op for op in index.weighted if index.at(op) > bounds.memory], bounds),
    }
    places = {}
    for op in index.weighted:
        named = module_of(op) if is_of_level(op) else names.get(id(op))
        module = named or f"{_part(index.at(op), bounds)}.{index.layer(op)}"
        places[op.output_arg_names[0]] = Place(module, _group(module))
    return places


def _part(at: int, bounds: Bounds) -> str:
    return "backbone" if at < bounds.encoder else "neck" if at < bounds.memory else "transformer"


def _group(module: str) -> str:
    if module.startswith("backbone."):
        return "backbone"
    if module.startswith("neck."):
        return "encoder"
    return "head" if "_head." in module and "query_pos_head" not in module else "decoder"


def _projection_names(bounds: Bounds) -> _Names:
    missing = bounds.levels - len(bounds.neck_projections)
    return {
        **{id(op): f"neck.input_proj.{level}" for level, op in enumerate(bounds.neck_projections, max(missing, 0))},
        **{id(op): f"transformer.input_proj.{level}" for level, op in enumerate(bounds.decoder_projections)},
    }


def _encoder_names(index: LayerIndex, within: Sequence[Any]) -> _Names:
    names: _Names = {}
    for number, attention in enumerate(attentions(index, within)):
        prefix = f"neck.encoder.{number}.layers.0"
        names.update(_self_attention_names(attention, prefix))
        at = index.at(attention.last)
        feed_forward = [op for op in within if index.at(op) > at and index.is_linear(op)][:2]
        names.update({id(op): f"{prefix}.linear{layer}" for layer, op in enumerate(feed_forward, 1)})
    return names


def _self_attention_names(attention: Attention, prefix: str) -> _Names:
    return {id(op): f"{prefix}.self_attn.{role}" for role, op in attention.ops.items()}


def _decoder_names(index: LayerIndex, within: Sequence[Any], bounds: Bounds) -> _Names:
    """Name the ops after the memory: heads of the query selection and of the layers, positions, and the layers."""
    linear = [op for op in within if index.is_linear(op)]
    found = list(attentions(index, within))
    names = {
        **_selection_names(index, linear, bounds),
        **_box_head_names(index, linear, bounds),
        **_position_names(index, linear),
    }
    for layer, attention in enumerate(found):
        names.update(_self_attention_names(attention, f"transformer.decoder.layers.{layer}"))
    unnamed = [op for op in linear if id(op) not in names]
    # The value projections are convolutions of each level, which have their names, if the memory is not computed.
    roles = _AFTER_SELF_ATTENTION if bounds.decoder_projections else _AFTER_SELF_ATTENTION[1:]
    return {**names, **_names_after_self_attention(index, unnamed, found, roles)}


def _selection_names(index: LayerIndex, linear: Sequence[Any], bounds: Bounds) -> _Names:
    """Name the linear layers before the top-k; :func:`_box_head_names` overrides those of the boxes."""
    selecting = [op for op in linear if index.at(op) < bounds.selection]
    names = dict.fromkeys(map(id, selecting), "transformer.enc_score_head.0")
    if bounds.decoder_projections:
        names.update(dict.fromkeys(map(id, selecting[:1]), "transformer.enc_output.0"))
    return names


def _box_head_names(index: LayerIndex, linear: Sequence[Any], bounds: Bounds) -> _Names:
    names: _Names = {}
    layer = 0
    for last in linear:
        if index.weight_shape(last)[-1] != _BOX:
            continue
        head = "enc_bbox_head"
        if index.at(last) > bounds.selection:
            head, layer = f"dec_bbox_head.{layer}", layer + 1
        chain = _box_head(index, last)
        names.update({id(op): f"transformer.{head}.layers.{number}" for number, op in enumerate(chain)})
    return names


def _box_head(index: LayerIndex, last: Any) -> list[Any]:
    """Return a box head's linear layers, ``last`` the last, joined by ReLUs."""
    chain = [last]
    while True:
        relu = index.producer.get(chain[0].input("X")[0])
        if relu is None or relu.type != "relu":
            return chain
        before = index.source(relu.input("X")[0], ("elementwise_add",))
        if not index.is_linear(before):
            return chain
        chain.insert(0, before)


def _position_names(index: LayerIndex, linear: Sequence[Any]) -> _Names:
    """Name the two layers that compute the positions of the queries from boxes."""
    names: _Names = {}
    for op in linear:
        if index.weight_shape(op)[0] == _BOX:
            names[id(op)] = "transformer.query_pos_head.layers.0"
            second = index.linear_after(op, ("elementwise_add", "relu"))
            if second is not None:
                names[id(second)] = "transformer.query_pos_head.layers.1"
    return names


def _names_after_self_attention(
    index: LayerIndex, unnamed: Sequence[Any], found: Sequence[Attention], roles: Sequence[str]
) -> _Names:
    """Name the rest of each decoder layer, from its self-attention to the next layer's, and its score head."""
    names: _Names = {}
    starts = [index.at(attention.last) for attention in found]
    for layer, (start, end) in enumerate(zip(starts, [*starts[1:], len(index.ops)])):
        rest = [op for op in unnamed if start < index.at(op) < end]
        for role, op in zip(roles, rest):
            names[id(op)] = f"transformer.decoder.layers.{layer}.{role}"
        for op in rest[len(roles) :]:
            names[id(op)] = f"transformer.dec_score_head.{layer}"
    return names
