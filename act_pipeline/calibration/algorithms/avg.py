"""``avg``: the mean over the images of each image's largest absolute value (PaddleSlim: over the batches)."""

from __future__ import annotations

from act_pipeline.calibration.observers import AbsMax


def threshold(statistics: AbsMax, hist_percent: float, lowest: float | None = None) -> float:
    """Return the mean of the images' largest absolute values."""
    return statistics.mean_abs_max
