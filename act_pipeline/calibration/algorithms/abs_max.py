"""``abs_max``: the largest absolute value."""

from __future__ import annotations

from act_pipeline.calibration.observers import AbsMax


def threshold(statistics: AbsMax, hist_percent: float, lowest: float | None = None) -> float:
    """Return the largest absolute value on the calibration images."""
    return statistics.abs_max
