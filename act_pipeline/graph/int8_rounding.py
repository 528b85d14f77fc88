"""Rounding of weights to INT8 and back."""

from __future__ import annotations

import numpy as np

_LEVELS = 127


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
    return np.round(weight / limit * _LEVELS) * limit / np.float32(_LEVELS)
