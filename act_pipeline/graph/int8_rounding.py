"""What INT8 makes of a weight."""

from __future__ import annotations

import numpy as np

_LEVELS = 127


def weight_threshold(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return the largest absolute values along all other axes, float32 [channels], or [1] for an axis of -1.

    A channel of zeros gets 1: it is 0 at any scale, and a scale of 0 would make NaN of it.
    """
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others if axis >= 0 else None).astype(np.float32).reshape(-1)
    return np.where(largest > 0, largest, np.float32(1))


def rounded_weight(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return what INT8 leaves of a weight, in the arithmetic of Paddle's ``QuantWeightPass`` and ``dequantize_linear``.

    Args:
        weight: float32.
        axis: of the output channels, each with a scale of its own; -1: one scale.

    Returns:
        float32 of the same shape, ``round(w / t * 127) * t / 127`` with t of :func:`weight_threshold`.
    """
    shape = [1] * weight.ndim
    if axis >= 0:
        shape[axis] = -1
    limit = weight_threshold(weight, axis).reshape(shape)
    return np.round(weight / limit * _LEVELS) * limit / np.float32(_LEVELS)
