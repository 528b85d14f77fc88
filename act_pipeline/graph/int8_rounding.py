"""Symmetric INT8: integers in [-128, 127] times a step; a threshold is 127 steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional

import numpy as np

LEVELS = 127
# float32 holds no more: the figure of what changes nothing.
MAX_SQNR_DB = 140.0
# A tensor counts as one-sided if its least value is at most this share of its threshold below 0: after ReLU, sigmoid,
# softmax, SiLU, GELU. What a matmul or a LayerNorm gives is not, and stays symmetric, which OpenVINO computes faster.
_ONE_SIDED = 0.5
_UNSIGNED_LEVELS = 255
_MIDDLE = 128


def to_int8(values: np.ndarray, step: np.ndarray | np.floating | float) -> np.ndarray:
    """Return ``clip(round(values / step), -128, 127)``, half to even, as ``quantize_linear`` of Paddle and ONNX round.

    Args:
        values: float, of any shape.
        step: broadcasts with ``values``.

    Returns:
        of the shape and float dtype of ``values / step``; ``astype(np.int8)`` is exact.
    """
    return np.clip(np.rint(values / step), -LEVELS - 1, LEVELS)


def unsigned_range(threshold: float, lowest: Optional[float] = None) -> tuple[float, int]:
    """Return the step and the zero point that a runtime rounds an activation to ``uint8`` with.

    A value x becomes ``clip(round(x / step) + zero_point, 0, 255)``. A one-sided tensor gets the range from its least
    value to its threshold, so that a ReLU's output has 255 steps instead of 127; all others get the zero point 128, the
    arithmetic of :func:`to_int8`. Zero is always exact, which the padding of convolutions needs.

    Args:
        threshold: the largest value, above 0.
        lowest: the least value; None: unknown, the tensor counts as symmetric.
    """
    if lowest is None or -lowest > _ONE_SIDED * threshold:
        return threshold / LEVELS, _MIDDLE
    step = (threshold - min(lowest, 0.0)) / _UNSIGNED_LEVELS
    return step, round(-min(lowest, 0.0) / step)


def scale_weights(program: Any, read: Callable[[str], np.ndarray], write: Callable[[str, np.ndarray], None]) -> None:
    """Give the weights of a program with inserted quantization the scales of what they are now.

    Paddle's ``Scale`` is the threshold, not its 127th part: the largest absolute value of each channel, or of all if
    they are quantized per tensor.

    Args:
        program: a ``paddle.static.Program``.
        read: returns a parameter by name.
        write: sets a parameter, float32 [channels] or [1].
    """
    block = program.global_block()
    for op in block.ops:
        if op.type == "quantize_linear" and block.var(op.input("X")[0]).persistable:
            write(op.input("Scale")[0], weight_threshold(read(op.input("X")[0]), op.attr("quant_axis")))


def weight_threshold(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return the largest absolute value of each channel of a weight, or of the whole weight.

    Args:
        weight: the weight, of any rank.
        axis: axis of the output channels; -1: one value for the whole weight.

    Returns:
        float32 [channels], or [1] for an axis of -1. A channel of zeros has 1, because a scale of 0 would result in
        NaN.
    """
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others if axis >= 0 else None).astype(np.float32).reshape(-1)
    return np.where(largest > 0, largest, np.float32(1))


def rounded_weight(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return a weight after quantization to INT8 and dequantization.

    The arithmetic is that of Paddle's ``QuantWeightPass`` and ``dequantize_linear``.

    Args:
        weight: float32, of any rank.
        axis: axis of the output channels, each with its own scale; -1: a single scale.

    Returns:
        float32 of the same shape, ``round(w / t * 127) * t / 127`` with ``t`` of :func:`weight_threshold`.
    """
    shape = [1] * weight.ndim
    if axis >= 0:
        shape[axis] = -1
    limit = weight_threshold(weight, axis).reshape(shape)
    return np.round(weight / limit * LEVELS) * limit / np.float32(LEVELS)


def sqnr_db(error: float) -> float:
    """Return the ratio of signal to quantization noise in dB of noise / signal, at most :data:`MAX_SQNR_DB`."""
    return min(-10 * math.log10(error), MAX_SQNR_DB) if error > 0 else MAX_SQNR_DB
