"""Which activations a training rounds with a zero point, as the ONNX files for the CPU will.

Training keeps the least values of the calibration that it starts from, and learns thresholds as without them. An
activation with a zero point has 255 steps from its least value to its threshold. In the training program it is rounded
by a signed op of one bit more, which has these steps from 0 to the threshold: exact for a least value of 0, and some
per cent finer than in the file for others. The test program, which the INT8 models are made from, only notes the least
values. Without zero points training would adapt the weights to roundings of twice the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.int8_rounding import unsigned_range
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.onnx_export.program import read_source
from act_pipeline.onnx_export.rewrites.zero_points import choose_zero_points


def lowest_with_zero_points(model: InferenceModel) -> dict[str, float]:
    """Return the activations of an INT8 model that ONNX files for the CPU round with a zero point of their own.

    Args:
        model: the INT8 model; call it within :func:`static_mode`.

    Returns:
        Activation -> its least value on the calibration images. Empty for a model without least values.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        source = read_source(graph)
    choose_zero_points(source)
    return {
        tensor.source: tensor.lowest
        for tensor in source.quantized.values()
        if tensor.weight is None
        and tensor.lowest is not None
        and unsigned_range(tensor.threshold, tensor.lowest) != unsigned_range(tensor.threshold)
    }


def zero_points_of(start: InferenceModel | None, checkpoints: Checkpoints | None) -> dict[str, float]:
    """Return what a training rounds with a zero point: what the interrupted run did, or what its start says.

    Args:
        start: the calibrated INT8 model that the training starts from; None: there is none.
        checkpoints: the checkpoint to resume from; None: there is none.

    Returns:
        As :func:`lowest_with_zero_points`.
    """
    if checkpoints is not None and checkpoints.resumed is not None:
        return checkpoints.lowest
    return {} if start is None else lowest_with_zero_points(start)


def round_finely(program: Any, activations: Collection[str]) -> int:
    """Round activations in 255 steps from 0 to their threshold, on either side, instead of 127.

    Args:
        program: a training program with Q/DQ, changed in place.
        activations: the names of the activations.

    Returns:
        The number of Q/DQ pairs that were changed.
    """
    rounded = set()
    for op in program.global_block().ops:
        if op.type == "quantize_linear" and op.input("X")[0] in activations:
            rounded.add(op.output("Y")[0])
        elif op.type != "dequantize_linear" or op.input("X")[0] not in rounded:
            continue
        op._set_attr("bit_length", op.attr("bit_length") + 1)
    return len(rounded)
