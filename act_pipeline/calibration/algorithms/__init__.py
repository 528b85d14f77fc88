"""Calibration algorithms: one file each, with PaddleSlim's names (``QuantPost.algo``).

An algorithm is a function of a tensor's statistics (:class:`act_pipeline.calibration.observers.AbsHistogram`),
``QuantPost.hist_percent`` and the tensor's least value (None: it is rounded symmetrically), which returns the
threshold. To add one: its file here, a line in :data:`ALGORITHMS`, and its name in
``act_pipeline.config.sections.CalibrationAlgorithm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Optional

from act_pipeline.calibration.algorithms import abs_max, avg, hist, kl, mce, mse
from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.config.sections import CalibrationAlgorithm

# In the order in which `auto` tries them.
ALGORITHMS: Mapping[CalibrationAlgorithm, Callable[[AbsHistogram, float, Optional[float]], float]] = {
    "mse": mse.threshold,
    "mce": mce.threshold,
    "avg": avg.threshold,
    "abs_max": abs_max.threshold,
    "hist": hist.threshold,
    "KL": kl.threshold,
}
