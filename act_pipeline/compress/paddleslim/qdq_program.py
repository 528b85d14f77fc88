"""Insert Q/DQ and observers into a float program by PaddleSlim's passes, and set their scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.compress.paddleslim.fast_passes import fast_passes
from act_pipeline.graph.int8_rounding import scale_weights
from act_pipeline.graph.op_types import LOWEST
from act_pipeline.graph.static_graph import StaticGraph

_OBSERVER = "moving_average_abs_max_scale"


def insert_quantization(graph: StaticGraph, settings: Mapping[str, Any]) -> Any:
    """Return a test program with Q/DQ and observers inserted, as quantization-aware training starts from.

    Their scales are parameters in ``graph.scope`` and are not valid until :func:`set_scales` is called.

    Args:
        graph: a float graph; its program is not changed.
        settings: ACT's keys of ``QuantAware``, ``quantize_op_types`` and so on.

    Returns:
        The ``paddle.static.Program``.
    """
    from paddleslim.quant import quant_aware

    with fast_passes():
        return quant_aware(
            graph.program, graph.executor.place, dict(settings), scope=graph.scope, for_test=True, return_program=True
        )


def quantized_tensors(program: Any) -> list[str]:
    """Return the names of the activations with Q/DQ in a program, in the order of the program."""
    block = program.global_block()
    names = [op.input("X")[0] for op in block.ops if op.type == "quantize_linear"]
    return [name for name in names if not block.var(name).persistable]


def observed_tensors(program: Any) -> list[str]:
    """Return the names of the tensors whose scales are only observed, in the order of the program."""
    return [op.input("X")[0] for op in program.global_block().ops if op.type == _OBSERVER]


def set_scales(program: Any, graph: StaticGraph, thresholds: Mapping[str, float]) -> None:
    """Set the scales of a program with Q/DQ; Paddle's ``Scale`` is the threshold itself, not threshold / 127.

    Args:
        program: the output of :func:`insert_quantization`.
        graph: the graph that it was made from; the scales are written to its scope.
        thresholds: tensor -> threshold, for all of :func:`quantized_tensors` and :func:`observed_tensors`.
    """
    block = program.global_block()
    for op in block.ops:
        if op.type == _OBSERVER:
            graph.set_parameter(op.output("OutScale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    # After the observers, since a tensor that is both observed and quantized has one scale.
    for op in block.ops:
        if op.type == "quantize_linear" and not block.var(op.input("X")[0]).persistable:
            graph.set_parameter(op.input("Scale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    scale_weights(program, graph.parameter, graph.set_parameter)


def set_lowest(program: Any, lowest: Mapping[str, float]) -> None:
    """Note the least values of activations at their ``quantize_linear``, for runtimes with zero points.

    Args:
        program: the output of :func:`insert_quantization`.
        lowest: activation -> its least value on the calibration images.
    """
    for op in program.global_block().ops:
        if op.type == "quantize_linear" and op.input("X")[0] in lowest:
            op._set_attr(LOWEST, float(lowest[op.input("X")[0]]))
