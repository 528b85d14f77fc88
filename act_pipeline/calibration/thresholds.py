"""Compute a tensor's threshold, the largest absolute value that INT8 represents, from its statistics.

The scale of a symmetric INT8 tensor is ``threshold / 127``. The names of the algorithms are PaddleSlim's
(``QuantPost.algo``). Docstrings state where a definition differs from
``paddle.static.quantization.PostTrainingQuantization`` of Paddle 2.6.2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from act_pipeline.calibration.observers import AbsHistogram

Algorithm = Literal["abs_max", "avg", "hist", "mse", "KL"]
LEVELS = 127
# Candidates of `mse`: abs_max * 2**(-i / 16), six octaves down.
_MSE_SHARES = np.exp2(-np.arange(97) / 16)
_KL_BINS = 2048
_NOTHING = 2.0**-22


def threshold(statistics: AbsHistogram, algo: Algorithm, hist_percent: float = 0.9999) -> float:
    """Return a tensor's threshold.

    Args:
        statistics: statistics of the tensor on the calibration images.
        algo: ``abs_max``: the largest absolute value. ``avg``: the mean over the images of each image's largest
            absolute value (PaddleSlim: over the batches). ``hist``: the quantile ``hist_percent`` of the absolute
            values. ``mse``: see :func:`mse_threshold`. ``KL``: see :func:`kl_threshold`, and ``mse`` where that returns
            None.
        hist_percent: the quantile of ``hist``, in (0, 1].

    Returns:
        The threshold in (0, ``abs_max``]; 0 if all values are zero.
    """
    if statistics.abs_max == 0:
        return 0.0
    if algo == "abs_max":
        return statistics.abs_max
    if algo == "avg":
        return statistics.mean_abs_max
    lower, upper, counts = statistics.bins()
    if algo == "hist":
        found = quantile(lower, upper, counts, hist_percent)
        # If nearly all values are 0, the quantile is close to 0 and would clip all others.
        if found < statistics.abs_max * _NOTHING:
            found = statistics.abs_max
    elif algo == "mse":
        found = mse_threshold(lower, upper, counts)
    else:
        histogram = uniform_histogram(lower, upper, counts, _KL_BINS)
        chosen = kl_threshold(histogram, statistics.abs_max / _KL_BINS)
        found = mse_threshold(lower, upper, counts) if chosen is None else chosen
    return min(found, statistics.abs_max)


def quantile(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, share: float) -> float:
    """Return a quantile of a histogram, interpolated linearly within its bin.

    Args:
        lower, upper, counts: [B] each, the output of :meth:`AbsHistogram.bins`.
        share: the share of the counted values that lie below the quantile, in (0, 1].
    """
    cumulated = np.cumsum(counts)
    wanted = share * cumulated[-1]
    index = min(int(np.searchsorted(cumulated, wanted)), len(counts) - 1)
    inside = (wanted - (cumulated[index] - counts[index])) / counts[index]
    return float(lower[index] + inside * (upper[index] - lower[index]))


def mse_threshold(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray) -> float:
    """Return the threshold with the least mean squared error between the absolute values and their INT8 rounding.

    The rounding is ``q(x) = min(round(x / t * 127), 127) * t / 127``. The candidates are ``t = abs_max * 2**(-i / 16)``
    for i in 0..96. The error is computed on all images together. PaddleSlim searches 0.3 to 1.0 of ``abs_max`` batch by
    batch, and keeps the threshold of the one batch that had the least error.

    Args:
        lower, upper, counts: [B] each, the output of :meth:`AbsHistogram.bins`; the middle of a bin stands for its
            values.
    """
    values, weights = (lower + upper) / 2, counts.astype(np.float64)
    candidates = upper[-1] * _MSE_SHARES
    errors = []
    for candidate in candidates:
        step = candidate / LEVELS
        restored = np.minimum(np.rint(values / step), LEVELS)
        restored *= step
        restored -= values
        restored *= restored
        errors.append(float(weights @ restored))
    return float(candidates[int(np.argmin(errors))])


def uniform_histogram(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, bins: int) -> np.ndarray:
    """Return a histogram with bins of equal width; counts are distributed in proportion to the overlap of the bins.

    Args:
        lower, upper, counts: [B] each, the output of :meth:`AbsHistogram.bins`.
        bins: the number of bins, from 0 to the last upper edge.

    Returns:
        Counts, float64 [bins].
    """
    edges = np.stack([lower, upper], axis=1).reshape(-1)
    cumulated = np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], axis=1).reshape(-1)
    at = np.interp(np.linspace(0, upper[-1], bins + 1), edges, cumulated, left=0)
    at[-1] = cumulated[-1]  # np.interp may miss the last bin where its width is 0 (all its values equal the largest)
    return np.diff(at)


def kl_threshold(histogram: np.ndarray, bin_width: float, levels: int = LEVELS) -> float | None:
    """Return the threshold with the least Kullback-Leibler divergence (entropy calibration, Migacz, GTC 2017).

    For every i from half of the bins on, P is ``histogram[:i]`` with all counts above added to its last bin. Q is
    ``histogram[:i]`` merged into ``levels`` groups of ``i // levels`` bins (the last group takes the remaining bins)
    and expanded again over the bins of each group that are not empty. The threshold is ``(i + 0.5) * bin_width`` for
    the i with the least KL(P || Q). This is ``paddle.static.quantization.cal_kl_threshold`` of Paddle 2.6.2, computed
    for all i at once.

    TensorRT starts at bin 128. On RT-DETR that clips some tensors to a twelfth of their range, and the model detects
    nothing.

    Args:
        histogram: counts of absolute values, [bins].
        bin_width: width of each bin.
        levels: the number of quantization levels.

    Returns:
        The threshold; None if the bin below every candidate i is empty, as for a constant, a mask or a single outlier.
        Paddle then clips at the last value of the lower half, which turns every constant into 0.
    """
    bins = len(histogram)
    last = np.arange(max((bins - 1) // 2, levels), bins)
    last = last[histogram[last - 1] > 0]
    if not len(last):
        return None
    total = float(histogram.sum())
    # Sums over bins [a, b) are differences of these.
    mass = np.concatenate([[0.0], np.cumsum(histogram)])
    held = np.concatenate([[0], np.cumsum(histogram > 0)])
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.concatenate([[0.0], np.cumsum(np.where(histogram > 0, histogram * np.log(histogram), 0.0))])
        # Edges of the groups, [candidates, levels + 1].
        edges = (last // levels)[:, None] * np.arange(levels + 1)
        edges[:, -1] = last
        q_mass = np.diff(mass[edges], axis=1)
        q_each = q_mass / np.diff(held[edges], axis=1)
        clipped = total - mass[last]
        p_mass = q_mass.copy()
        p_mass[:, -1] += clipped
        tail = histogram[last - 1]
        p_log_p = entropy[last] - tail * np.log(tail) + (tail + clipped) * np.log(tail + clipped)
        p_log_q = np.where(p_mass > 0, p_mass * np.log(q_each), 0.0).sum(axis=1)
    q_total = mass[last]
    divergence = (p_log_p - p_log_q) / total + np.log(q_total / total)
    return float((last[int(np.argmin(divergence))] + 0.5) * bin_width)
