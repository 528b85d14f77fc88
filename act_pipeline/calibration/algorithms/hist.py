"""``hist``: a quantile of the absolute values."""

from __future__ import annotations

from act_pipeline.calibration.histograms import quantile
from act_pipeline.calibration.observers import AbsHistogram

_NOTHING = 2.0**-22


def threshold(statistics: AbsHistogram, hist_percent: float, lowest: float | None = None) -> float:
    """Return the quantile ``hist_percent``, in (0, 1], of the absolute values."""
    found = quantile(*statistics.bins(), hist_percent)
    # If nearly all values are 0, the quantile is close to 0 and would clip all others.
    return statistics.abs_max if found < statistics.abs_max * _NOTHING else found
