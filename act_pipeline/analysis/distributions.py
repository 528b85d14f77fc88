"""Statistics of weights and activations that matter for INT8 quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.calibration.observers import AbsHistogram, NotFiniteError, Observer
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph

HISTOGRAM_BINS = 64
QUANTILES = {"p1": 0.01, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p99": 0.99, "p99_9": 0.999, "p99_99": 0.9999}
# LLM.int8() defines outliers as values above 6, in activations whose root mean square is about 1.
_OUTLIER_RMS = 6.0


class Extent:
    """Observer of the smallest and the largest value of a tensor, and of the largest absolute value per channel.

    Args:
        axis: the channel axis.

    Attributes:
        min, max: smallest and largest value so far; infinity and minus infinity before the first update.
        channel_abs_max: float32 [channels], the largest absolute values; empty before the first update, or if the
            number of channels varies.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.min, self.max = float("inf"), float("-inf")
        self.channel_abs_max = np.zeros(0, np.float32)
        self._uneven = False

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`act_pipeline.calibration.observers.Observer`."""
        if not values.size:
            return
        axis = self.axis % values.ndim
        others = tuple(other for other in range(values.ndim) if other != axis)
        low, high = values.min(axis=others), values.max(axis=others)
        self.min, self.max = min(self.min, float(low.min())), max(self.max, float(high.max()))
        largest = np.maximum(high, -low).astype(np.float32)
        if self.channel_abs_max.size not in (0, largest.size):
            self._uneven = True
        if self._uneven:
            self.channel_abs_max = np.zeros(0, np.float32)
        elif self.channel_abs_max.size:
            np.maximum(self.channel_abs_max, largest, out=self.channel_abs_max)
        else:
            self.channel_abs_max = largest


class TensorObserver:
    """Observers of one tensor.

    Args:
        channel_axis: the channel axis.

    Attributes:
        histogram: histogram of the absolute values, from which :func:`act_pipeline.calibration.thresholds.threshold`
            computes thresholds.
        extent: smallest and largest values, also per channel.
    """

    def __init__(self, channel_axis: int) -> None:
        self.histogram = AbsHistogram()
        self.extent = Extent(channel_axis)

    @property
    def observers(self) -> list[Observer]:
        """The observers that :func:`act_pipeline.calibration.collector.collect` updates."""
        return [self.histogram, self.extent]

    @property
    def constant(self) -> bool:
        """Whether the tensor had a single value at all positions of all images."""
        return self.extent.min == self.extent.max

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the tensor, see :func:`statistics`."""
        return statistics(self.histogram, self.extent)


def observe_activations(ops: Sequence[QuantizableOp]) -> dict[str, TensorObserver]:
    """Create an observer for every activation that ``ops`` read.

    The channel axis of a matmul's input is the last, that of any other op's input is 1.

    Returns:
        tensor name -> observer.
    """
    observers: dict[str, TensorObserver] = {}
    for op in ops:
        for name in op.activations:
            observers.setdefault(name, TensorObserver(-1 if op.type.startswith("matmul") or op.type == "mul" else 1))
    return observers


def weight_statistics(graph: StaticGraph, ops: Sequence[QuantizableOp]) -> dict[str, dict[str, Any]]:
    """Return weight name -> statistics (see :func:`statistics`), with one channel per quantization scale.

    Args:
        graph: the float model.
        ops: the ops whose weights are described.

    Raises:
        NotFiniteError: a weight is NaN or infinite; the message has its name and its op.
    """
    found: dict[str, dict[str, Any]] = {}
    for op in ops:
        if op.weight is None or op.weight in found:
            continue
        observer = TensorObserver(op.weight_axis)
        value = graph.parameter(op.weight).astype(np.float32)
        try:
            for each in observer.observers:
                each.update(value, 1)
        except NotFiniteError as error:
            raise NotFiniteError(f"weight {op.weight} of {op.type} ({op.name}) holds {error}") from None
        found[op.weight] = observer.statistics()
    return found


def statistics(histogram: AbsHistogram, extent: Extent) -> dict[str, Any]:
    """Return the statistics of a tensor in JSON types.

    Returns:
        ``min``, ``max``, ``abs_max``; ``rms``, the root mean square; the quantiles of the absolute values under the
        names in :data:`QUANTILES`; ``outlier_ratio``, the share of values whose absolute value is above 6 ``rms``
        (Dettmers et al., "LLM.int8()", NeurIPS 2022, section 3, use 6.0 where the activations' ``rms`` is about 1);
        ``channels``, the number of channels; ``channel_spread``, the ratio of the largest to the median ``abs_max`` of
        the channels (None if the median is 0); ``channel_abs_max``, their quartiles (``min``, ``p25``, ``p50``,
        ``p75``, ``max``); ``worst_channel``, the index of the largest; ``histogram``: ``counts`` of absolute values in
        64 bins of equal width from ``min`` (0) to ``max`` (``abs_max``).
    """
    from act_pipeline.calibration.histograms import quantile, uniform_histogram

    channel_abs_max = extent.channel_abs_max
    lower, upper, counts = histogram.bins()
    total = int(counts.sum())
    middle = (lower + upper) / 2
    rms = float(np.sqrt((counts * middle**2).sum() / total)) if total else 0.0
    empty = not total or histogram.abs_max == 0
    quartiles = np.quantile(channel_abs_max, [0, 0.25, 0.5, 0.75, 1]) if channel_abs_max.size else None
    return {
        "min": extent.min if total else 0.0,
        "max": extent.max if total else 0.0,
        "abs_max": histogram.abs_max,
        "rms": rms,
        **{name: 0.0 if empty else quantile(lower, upper, counts, share) for name, share in QUANTILES.items()},
        "outlier_ratio": float(counts[lower >= _OUTLIER_RMS * rms].sum() / total) if total and rms else 0.0,
        "channels": int(channel_abs_max.size),
        "channel_spread": spread(channel_abs_max),
        "channel_abs_max": _named(quartiles),
        "worst_channel": int(np.argmax(channel_abs_max)) if channel_abs_max.size else None,
        "histogram": {
            "min": 0.0,
            "max": histogram.abs_max,
            "counts": (
                [0] * HISTOGRAM_BINS
                if empty
                else np.rint(uniform_histogram(lower, upper, counts, HISTOGRAM_BINS)).astype(np.int64).tolist()
            ),
        },
    }


def spread(channel_abs_max: np.ndarray) -> float | None:
    """Return the ratio of the largest to the median value; None if the median is 0.

    Args:
        channel_abs_max: [channels], the largest absolute value of each channel.
    """
    middle = float(np.median(channel_abs_max)) if channel_abs_max.size else 0.0
    return float(channel_abs_max.max()) / middle if middle > 0 else None


def _named(quartiles: np.ndarray | None) -> Mapping[str, float] | None:
    if quartiles is None:
        return None
    return {name: float(value) for name, value in zip(("min", "p25", "p50", "p75", "max"), quartiles)}
