"""Quantiles of histograms, and histograms with bins of equal width."""

from __future__ import annotations

import numpy as np


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
