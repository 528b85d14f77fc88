"""From the statistics of a tensor to its threshold: the largest absolute value that INT8 shall represent.

The scale of a symmetric INT8 tensor is ``threshold / 127``. The names are PaddleSlim's (``QuantPost.algo``); where the
definition differs from ``paddle.static.quantization.PostTrainingQuantization`` of Paddle 2.6.2, the function says how.
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
    """Return a tensor's threshold, in (0, abs_max]; 0 if the tensor held nothing but zeros.

    Args:
        statistics: of the tensor on the calibration images.
        algo: ``abs_max``: the largest absolute value. ``avg``: the mean over the images of each one's largest absolute
            value (PaddleSlim: over the batches). ``hist``: the quantile ``hist_percent`` of the absolute values.
            ``mse``: see :func:`mse_threshold`. ``KL``: see :func:`kl_threshold`.
        hist_percent: for ``hist``, in (0, 1].
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
        # A quantile that is as good as 0, since nearly all values are, would leave nothing of the others.
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
    """Return the value below which ``share`` of the counted values lie, interpolated within its bin.

    Args:
        lower, upper, counts: [B], as :meth:`AbsHistogram.bins` gives them.
        share: in (0, 1].
    """
    cumulated = np.cumsum(counts)
    wanted = share * cumulated[-1]
    index = min(int(np.searchsorted(cumulated, wanted)), len(counts) - 1)
    inside = (wanted - (cumulated[index] - counts[index])) / counts[index]
    return float(lower[index] + inside * (upper[index] - lower[index]))


def mse_threshold(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray) -> float:
    """Return the threshold of the least mean squared error between the values and their INT8 form.

    ``q(x) = clip(round(x / t * 127), -128, 127) * t / 127``; candidates are ``abs_max * 2**(-i / 16)`` for i in 0..96.
    PaddleSlim searches 0.3 to 1.0 of abs_max, batch by batch, and keeps the one threshold of the batch that had the
    least error; here the error is that of all images.

    Args:
        lower, upper, counts: [B], as :meth:`AbsHistogram.bins` gives them.
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
    """Return float64 [bins] counts over bins of one width from 0 to the last upper edge, shared out by overlap."""
    edges = np.stack([lower, upper], axis=1).reshape(-1)
    cumulated = np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], axis=1).reshape(-1)
    at = np.interp(np.linspace(0, upper[-1], bins + 1), edges, cumulated, left=0)
    at[-1] = cumulated[-1]  # a last bin of no width: every value is the largest one
    return np.diff(at)


def kl_threshold(histogram: np.ndarray, bin_width: float, levels: int = LEVELS) -> float | None:
    """Return the threshold of the least Kullback-Leibler divergence (entropy calibration, Migacz, GTC 2017).

    For every i from the half of the bins on: P is ``histogram[:i]`` with all that lies above added to its last bin, Q
    is ``histogram[:i]`` merged into ``levels`` groups of ``i // levels`` bins (the last group takes the rest) and
    spread again over the bins of each group that are not empty. The i with the least KL(P || Q) gives ``(i + 0.5) *
    bin_width``. This is ``paddle.static.quantization.cal_kl_threshold`` of Paddle 2.6.2, computed for all i at once.
    TensorRT begins at
    bin 128: on RT-DETR that cuts some tensors to a twelfth, and the model finds nothing any more.

    Args:
        histogram: [bins] counts of absolute values.
        bin_width: of each bin.
        levels: of the quantized values.

    Returns:
        None if the upper half of the bins is empty but for the last: a constant, a mask, or one outlier. Paddle then
        cuts at the last value of the lower half, which makes 0 of every constant; :func:`threshold` takes ``mse``.
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
        # [candidates, levels + 1]: the edges of the groups.
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
