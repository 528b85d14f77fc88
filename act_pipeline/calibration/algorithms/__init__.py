"""Calibration algorithms: one file each, with PaddleSlim's names (``QuantPost.algo``).

An algorithm is a function of a tensor's statistics (:class:`act_pipeline.calibration.observers.AbsHistogram`) and
``QuantPost.hist_percent``, which returns the threshold. To add one: its file here, a line in :data:`ALGORITHMS`, and
its name in ``act_pipeline.config.sections.CalibrationAlgorithm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from act_pipeline.calibration.algorithms import abs_max, avg, hist, kl, mse
from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.config.sections import CalibrationAlgorithm

# In the order in which `auto` tries them.
ALGORITHMS: Mapping[CalibrationAlgorithm, Callable[[AbsHistogram, float], float]] = {
    "mse": mse.threshold,
    "avg": avg.threshold,
    "abs_max": abs_max.threshold,
    "hist": hist.threshold,
    "KL": kl.threshold,
}
