"""``mse``: the least mean squared error between the values and their INT8 form."""

from __future__ import annotations

import numpy as np

from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.graph.int8_rounding import unsigned_range

# Candidates: abs_max * 2**(-i / 16), six octaves down.
_MSE_SHARES = np.exp2(-np.arange(97) / 16)


def threshold(statistics: AbsHistogram, hist_percent: float, lowest: float | None = None) -> float:
    """Return :func:`mse_threshold` of the histogram."""
    return mse_threshold(*statistics.bins(), lowest)


def mse_threshold(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, lowest: float | None = None, power: float = 2.0
) -> float:
    """Return the threshold with the least mean squared error between the absolute values and their 8-bit rounding.

    The rounding is ``q(x) = min(round(x / s) * s, t)`` with the step ``s`` of
    :func:`act_pipeline.graph.int8_rounding.unsigned_range`: ``t / 127`` if the tensor is not one-sided. The candidates
    are ``t = abs_max * 2**(-i / 16)`` for i in 0..96. The error is computed on all images together. PaddleSlim searches
    0.3 to 1.0 of ``abs_max`` batch by batch, and keeps the threshold of the one batch that had the least error.

    Args:
        lower, upper, counts: [B] each, the output of :meth:`AbsHistogram.bins`; the middle of a bin stands for its
            values.
        lowest: the least value of the tensor, where runtimes round with zero points; None: they round symmetrically.
        power: the exponent of the error.
    """
    values, weights = (lower + upper) / 2, counts.astype(np.float64)
    best, least = float(upper[-1]), np.inf
    for candidate in (upper[-1] * _MSE_SHARES).tolist():
        step, _ = unsigned_range(candidate, lowest)
        first = int(np.searchsorted(values, candidate + step))  # from here on all values are clipped
        # What is clipped costs more with every further candidate: none is better once that alone costs more.
        clipped = _error(values[first:] - candidate, weights[first:], power)
        if clipped > least:
            break
        inside = values[:first]
        restored = np.rint(inside / step)
        restored *= step
        np.minimum(restored, candidate, out=restored)
        restored -= inside
        error = clipped + _error(restored, weights[:first], power)
        if error < least:
            best, least = candidate, error
    return best


def _error(differences: np.ndarray, weights: np.ndarray, power: float) -> float:
    """Return the sum of ``|differences| ** power``, weighted; the differences are changed."""
    squares = differences * differences
    if power == 3:  # NumPy's powers take ten times as long
        squares *= np.abs(differences, out=differences)
    elif power != 2:
        squares **= power / 2
    return float(weights @ squares)
