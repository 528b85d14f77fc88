"""Compute a tensor's threshold, the largest absolute value that INT8 represents, from its statistics.

The scale of a symmetric INT8 tensor is ``threshold / 127``; for the others see
:func:`act_pipeline.graph.int8_rounding.unsigned_range`. `calibration.algorithms` has the algorithms; their
docstrings state where a definition differs from ``paddle.static.quantization.PostTrainingQuantization`` of Paddle
2.6.2.
"""

from __future__ import annotations

from act_pipeline.calibration.algorithms import ALGORITHMS
from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.config.sections import CalibrationAlgorithm


def threshold(
    statistics: AbsHistogram, algo: CalibrationAlgorithm, hist_percent: float = 0.9999, zero_points: bool = False
) -> float:
    """Return a tensor's threshold.

    Args:
        statistics: statistics of the tensor on the calibration images.
        algo: a name of :data:`act_pipeline.calibration.algorithms.ALGORITHMS`.
        hist_percent: the quantile of ``hist``, in (0, 1].
        zero_points: whether runtimes round one-sided tensors with zero points.

    Returns:
        The threshold in (0, ``abs_max``]; 0 if all values are zero.
    """
    if statistics.abs_max == 0:
        return 0.0
    lowest = statistics.lowest if zero_points else None
    return min(ALGORITHMS[algo](statistics, hist_percent, lowest), statistics.abs_max)
