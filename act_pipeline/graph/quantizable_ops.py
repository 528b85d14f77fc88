"""The ops of a float graph that can compute in INT8: what a sensitivity belongs to, and what a user may exclude."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Optional

from act_pipeline.graph.rtdetr_modules import OTHER_GROUP, Place, find_places
from act_pipeline.graph.static_graph import StaticGraph

_CONVOLUTIONS = ("conv2d", "depthwise_conv2d", "conv2d_transpose")
_SLOTS = ("Input", "Filter", "X", "Y")


@dataclass(frozen=True)
class QuantizableOp:
    """An op that quantization puts Q/DQ before.

    Attributes:
        name: its first output, which no other op has.
        type: ``conv2d``, ``depthwise_conv2d``, ``matmul_v2``, ...
        module: where it stands, see :func:`act_pipeline.graph.rtdetr_modules.find_places`; ops that share a weight
            share it.
        group: ``backbone``, ``encoder``, ``decoder``, ``head``, or ``model`` where these cannot be told.
        activations: the tensors that it reads and that are no parameters, one or two.
        weight: its parameter; None: it multiplies two activations.
        weight_axis: the axis of the output channels in the weight; -1 without one.
    """

    name: str
    type: str
    module: str
    group: str
    activations: tuple[str, ...]
    weight: Optional[str]
    weight_axis: int


def quantizable_ops(graph: StaticGraph, op_types: Collection[str]) -> list[QuantizableOp]:
    """Return the ops of the types ``op_types``, in the order of the program.

    Args:
        graph: a float graph, its constants folded.
        op_types: as ``QuantAware.quantize_op_types`` names them.
    """
    places = find_places(graph)
    found = []
    for op in graph.program.global_block().ops:
        if op.type not in op_types:
            continue
        names = [name for slot in _SLOTS if slot in op.input_names for name in op.input(slot)]
        weights = [name for name in names if graph.is_parameter(name)]
        activations = tuple(dict.fromkeys(name for name in names if not graph.is_parameter(name)))
        if not activations:
            continue
        output = op.output_arg_names[0]
        place = places.get(output, Place(f"model.{output.split('.')[0]}", OTHER_GROUP))
        axis = -1
        if weights:
            # PaddleSlim's quant_axis: of a matmul's weight the columns, whether it is transposed when used or not.
            axis = 0 if op.type in _CONVOLUTIONS[:2] else 1
        found.append(
            QuantizableOp(
                output, op.type, place.module, place.group, activations, weights[0] if weights else None, axis
            )
        )
    return found
