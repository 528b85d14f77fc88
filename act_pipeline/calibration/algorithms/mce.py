"""``mce``: the least mean cubed error between the values and their 8-bit form.

The rounding of values within the range and the clipping of those above are weighed against each other as in ``mse``,
but a large error counts more. BRECQ, and MQBench after it, take the exponent 2.4 for the same reason.
"""

from __future__ import annotations

from act_pipeline.calibration.algorithms.mse import mse_threshold
from act_pipeline.calibration.observers import AbsHistogram

_POWER = 3.0


def threshold(statistics: AbsHistogram, hist_percent: float, lowest: float | None = None) -> float:
    """Return :func:`act_pipeline.calibration.algorithms.mse.mse_threshold` for cubed errors."""
    return mse_threshold(*statistics.bins(), lowest, _POWER)
