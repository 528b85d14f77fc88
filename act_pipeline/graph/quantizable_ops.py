"""The ops of a float graph that can compute in INT8: the units of sensitivity analysis and of exclusion by users."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Optional

from act_pipeline.graph.name_scopes import module_of
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.rtdetr_modules import OTHER_GROUP, Place, find_places
from act_pipeline.graph.static_graph import StaticGraph

_SLOTS = ("Input", "Filter", "X", "Y")


@dataclass(frozen=True)
class QuantizableOp:
    """An op whose inputs can be quantized.

    Attributes:
        name: name of its first output, which is unique.
        type: ``conv2d``, ``depthwise_conv2d``, ``matmul_v2``, ...
        module: its module, see :func:`act_pipeline.graph.rtdetr_modules.find_places`.
        group: ``backbone``, ``encoder``, ``decoder``, ``head``, or ``model`` where the part is not determined.
        activations: names of the one or two inputs that are not parameters.
        weight: name of its parameter; None: it multiplies two activations.
        weight_axis: axis of the output channels of the weight; -1 without a weight.
    """

    name: str
    type: str
    module: str
    group: str
    activations: tuple[str, ...]
    weight: Optional[str]
    weight_axis: int


def quantizable_ops(graph: StaticGraph, op_types: Collection[str]) -> list[QuantizableOp]:
    """Return the ops of the given types that read an activation, in the order of the program.

    Args:
        graph: a float graph with folded constants.
        op_types: Paddle op types, as in ``QuantAware.quantize_op_types``.
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
        place = places.get(output, Place(module_of(op) or f"{OTHER_GROUP}.{output.split('.')[0]}", OTHER_GROUP))
        axis = -1
        if weights:
            # PaddleSlim's quant_axis: for matmul weights it is the columns, also if the op transposes the weight. A
            # vector has the axis 0 alone; it stays float by default.
            vector = len(graph.program.global_block().var(weights[0]).shape) == 1
            axis = 0 if op.type in CONVOLUTIONS or vector else 1
        found.append(
            QuantizableOp(
                output, op.type, place.module, place.group, activations, weights[0] if weights else None, axis
            )
        )
    return found
