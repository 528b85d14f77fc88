"""A float graph with Q/DQ inserted, whose scales are set after the calibration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from act_pipeline.compress.paddleslim import qdq_program
from act_pipeline.compress.plan.op_selection import skip_patterns, unmark_float
from act_pipeline.config import QuantPost
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.graph.static_graph import StaticGraph


@dataclass
class Inserted:
    """A float graph and its program with Q/DQ inserted, which share a scope.

    Attributes:
        graph: the float graph.
        program: the program with Q/DQ and observers.
    """

    graph: StaticGraph
    program: Any


def insert(model: InferenceModel, settings: QuantPost, taken_back: Collection[str] = ()) -> Inserted:
    """Load a float model and insert Q/DQ, whose scales are not valid yet.

    Args:
        model: the float model with folded constants and BatchNorm.
        settings: section ``QuantPost``.
        taken_back: ops that get Q/DQ although they are marked in ``model``.
    """
    with quiet_upstream():
        graph = StaticGraph.load(model)
        graph.unwrap_outputs()
        unmark_float(graph, taken_back)
        program = qdq_program.insert_quantization(
            graph,
            {
                "quantize_op_types": settings.quantize_op_types,
                "weight_quantize_type": settings.weight_quantize_type,
                "activation_quantize_type": "moving_average_abs_max",
                "not_quant_pattern": skip_patterns(settings.not_quant_pattern),
                "weight_bits": settings.weight_bits,
                "activation_bits": settings.activation_bits,
                "onnx_format": settings.onnx_format,
            },
        )
    return Inserted(graph, program)
