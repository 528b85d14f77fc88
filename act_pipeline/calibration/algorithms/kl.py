"""``KL``: the least Kullback-Leibler divergence between the distributions before and after quantization."""

from __future__ import annotations

import numpy as np

from act_pipeline.calibration.algorithms.mse import mse_threshold
from act_pipeline.calibration.histograms import uniform_histogram
from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.graph.int8_rounding import LEVELS

_KL_BINS = 2048


def threshold(statistics: AbsHistogram, hist_percent: float, lowest: float | None = None) -> float:
    """Return :func:`kl_threshold` of the histogram, and ``mse``'s where that returns None."""
    bins = statistics.bins()
    found = kl_threshold(uniform_histogram(*bins, _KL_BINS), statistics.abs_max / _KL_BINS)
    return mse_threshold(*bins, lowest) if found is None else found


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
