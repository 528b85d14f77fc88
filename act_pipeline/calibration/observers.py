"""Running statistics of a tensor, in memory that does not grow with the number of images.

An observer has ``update(values, images)``: ``values`` is a float32 array of any shape, and ``images`` is the number of
equal parts along its first axis, one for each image of the batch (1: the whole array belongs to one image). To gather
another statistic, write a class with that method and pass it to :func:`act_pipeline.calibration.collector.collect`.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

_MANTISSA_BITS = 11
_BINS_PER_OCTAVE = 1 << _MANTISSA_BITS
_OCTAVES = 24
_BINS = _OCTAVES * _BINS_PER_OCTAVE
_FLOAT32_MANTISSA_BITS = 23
_DROPPED_BITS = _FLOAT32_MANTISSA_BITS - _MANTISSA_BITS
_ABS_MASK = np.uint32(0x7FFFFFFF)
# Values processed at a time, so that the temporary arrays stay in the CPU cache.
_CHUNK = 1 << 17


class Observer(Protocol):
    """Interface of the observers that :func:`act_pipeline.calibration.collector.collect` feeds."""

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch to the statistics.

        Args:
            values: float32, any shape.
            images: the number of equal parts along the first axis, one for each image; 1: one image.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """


class NotFiniteError(ValueError):
    """A tensor holds a NaN or an infinite value."""


class AbsMax:
    """Record the largest absolute value: over all images, and as a mean over the images.

    Args:
        finite_only: ignore infinite values instead of raising. For tensors that are not quantized: RT-DETR masks
            anchors near the image border with infinity, from input sizes of 400 on.

    Attributes:
        finite_only: as given.
        abs_max: the largest absolute value so far; 0 before the first image.
        lowest: the least value so far, at most 0.
        images: the number of images so far.
    """

    def __init__(self, finite_only: bool = False) -> None:
        self.finite_only = finite_only
        self.abs_max = 0.0
        self.lowest = 0.0
        self.images = 0
        self._sum = 0.0

    @property
    def mean_abs_max(self) -> float:
        """The mean over the images of each image's largest absolute value."""
        return self._sum / max(self.images, 1)

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch to the statistics; see :meth:`Observer.update`."""
        if not values.size:
            return
        rows = values.reshape(images, -1)
        least, most = self._extremes(values, images)
        largest = np.maximum(most, -least).astype(np.float64)  # NaN stays NaN
        if not np.isfinite(largest).all():
            if np.isnan(largest).any():
                raise NotFiniteError("NaN")
            if not self.finite_only:
                raise NotFiniteError("an infinite value")
            finite = np.where(np.isfinite(rows), rows, 0)
            least = finite.min(axis=1)
            largest = np.maximum(finite.max(axis=1), -least).astype(np.float64)
        self.abs_max = max(self.abs_max, float(largest.max()))
        self.lowest = min(self.lowest, float(least.min()))
        self._sum += float(largest.sum())
        self.images += images

    def _extremes(self, values: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest value of every image, [images] each."""
        rows = values.reshape(images, -1)
        return rows.min(axis=1), rows.max(axis=1)


class AbsHistogram(AbsMax):
    """Record a histogram of absolute values with logarithmic bins, in addition to :class:`AbsMax`.

    The bin of a value is its float32 exponent and the first 11 bits of its mantissa. There are 2,048 bins an octave,
    each at most 1/2,048 of its value wide, so the relative resolution is the same for small and large values.

    The histogram covers the 24 octaves below the largest value. When a larger value comes, this window moves up, and
    the counts below it are added to the lowest bin, which also counts the zeros. An outlier of any size therefore costs
    no resolution at the other values, as it would with bins of equal width, and the result does not depend on the order
    of the images. The lowest bin ends at ``abs_max / 2**23`` or below, less than an INT8 step of any useful scale.

    Args:
        sample: the largest number of values of an image to count, evenly spread over the tensor; None: all.
            ``abs_max`` and ``mean_abs_max`` always take all values into account.
    """

    def __init__(self, sample: int | None = None) -> None:
        super().__init__()
        self.sample = sample
        self._counts = np.zeros(_BINS, np.int64)
        self._base: int | None = None  # the bits of the float32 where the lowest bin begins, without the dropped ones

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch to the statistics; see :meth:`Observer.update`."""
        values = np.ascontiguousarray(values, np.float32)
        super().update(values, images)
        if self.abs_max > 0:
            self._raise_window()
        bits = self._sampled(values, images).view(np.uint32)
        base = np.uint32(self._base or 0)
        for start in range(0, bits.size, _CHUNK):
            index = bits[start : start + _CHUNK] & _ABS_MASK
            index >>= np.uint32(_DROPPED_BITS)
            np.maximum(index, base, out=index)
            index -= base
            counts = np.bincount(index)
            self._counts[: counts.size] += counts

    def _sampled(self, values: np.ndarray, images: int) -> np.ndarray:
        """Return the values to count, float32 [values], contiguous."""
        start, step = self._places(values, images)
        return np.ascontiguousarray(values.reshape(-1)[start::step])

    def _places(self, values: np.ndarray, images: int) -> tuple[int, int]:
        """Return the index of the first value to count, and the step to the next one."""
        step = values.size // (self.sample * images) if self.sample else 1
        if step <= 1:
            return 0, 1
        # A step with a common factor with a dimension would sample only some of its rows, columns or channels.
        while any(math.gcd(step, size) > 1 for size in values.shape):
            step += 1
        return self.images % step, step

    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the bins that are not empty, in ascending order.

        Returns:
            Lower edges, float64 [B]; upper edges, float64 [B]; counts, int64 [B]. The lowest bin begins at 0, and no
            edge is above ``abs_max``.
        """
        if self._base is None:
            seen = self._counts[:1]
            return np.zeros(seen.any().astype(int)), np.zeros(seen.any().astype(int)), seen[seen > 0]
        edges = (np.arange(_BINS + 1, dtype=np.uint32) + np.uint32(self._base)) << np.uint32(_DROPPED_BITS)
        edges = edges.view(np.float32).astype(np.float64)
        edges[0] = 0.0
        held = np.flatnonzero(self._counts)
        return edges[held], np.minimum(edges[held + 1], self.abs_max), self._counts[held]

    def _raise_window(self) -> None:
        """Move the window so that its highest octave is that of ``abs_max``."""
        exponent = int(np.float32(self.abs_max).view(np.uint32) >> np.uint32(_FLOAT32_MANTISSA_BITS))
        base = max(exponent - _OCTAVES + 1, 0) * _BINS_PER_OCTAVE
        if self._base is None:
            self._base = base  # only zeros have been counted so far, and these stay in the lowest bin
        elif base > self._base:
            moved = min(base - self._base, _BINS)
            counts = np.zeros_like(self._counts)
            counts[: _BINS - moved] = self._counts[moved:]
            counts[0] += self._counts[:moved].sum()
            self._counts, self._base = counts, base


class DividedHistogram(AbsHistogram):
    """Record the histogram of a tensor with each channel divided by a factor of its own.

    It is what :class:`Divided` gives, bit by bit, but only the sample and the channels' extremes are divided.

    Args:
        sample: see :class:`AbsHistogram`.
        by: the factors, float32 [channels], above 0.
        axis: the axis of the channels.
    """

    def __init__(self, sample: int | None, by: np.ndarray, axis: int) -> None:
        super().__init__(sample)
        self._inverse, self._axis = (1 / by).astype(np.float32), axis

    def _extremes(self, values: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
        channels = values.reshape(images, -1, len(self._inverse), self._inner(values))
        if channels.shape[3] == 1:
            least, most = channels[..., 0].min(axis=1), channels[..., 0].max(axis=1)
        else:
            least, most = channels.min(axis=3).min(axis=1), channels.max(axis=3).max(axis=1)
        return (least * self._inverse).min(axis=1), (most * self._inverse).max(axis=1)

    def _sampled(self, values: np.ndarray, images: int) -> np.ndarray:
        start, step = self._places(values, images)
        channel = np.arange(start, values.size, step) // self._inner(values) % len(self._inverse)
        return values.reshape(-1)[start::step] * self._inverse[channel]

    def _inner(self, values: np.ndarray) -> int:
        """Return the number of values of a channel that follow one another."""
        return math.prod(values.shape[self._axis % values.ndim + 1 :])


class Divided:
    """Feed a tensor to another observer with each channel divided by a factor of its own.

    Args:
        observer: the other observer.
        by: the factors, float32 [channels].
        axis: the axis of the channels.
    """

    def __init__(self, observer: Observer, by: np.ndarray, axis: int) -> None:
        self._observer, self._axis = observer, axis
        self._inverse = (1 / by).astype(np.float32)

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch; see :meth:`Observer.update`."""
        shape = [1] * values.ndim
        shape[self._axis] = -1
        self._observer.update(values * self._inverse.reshape(shape), images)


class ChannelMean:
    """Record the mean of every channel.

    Args:
        axis: the axis of the channels.

    Attributes:
        axis: as given.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._sum: np.ndarray | None = None
        self._count = 0

    @property
    def mean(self) -> np.ndarray:
        """float64 [channels]; empty if nothing was seen."""
        return np.zeros(0) if self._sum is None else self._sum / max(self._count, 1)

    def divided(self, by: np.ndarray) -> ChannelMean:
        """Return what would have been seen of a tensor whose channels are divided by ``by``, [channels]."""
        found = ChannelMean(self.axis)
        found._sum, found._count = None if self._sum is None else self._sum / by, self._count
        return found

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch to the statistics; see :meth:`Observer.update`."""
        axis = self.axis % values.ndim
        if axis == 1 and values.ndim > 2:
            # Each map is summed in float32, pairwise by NumPy: three times as fast as float64 for all sums.
            maps = np.ascontiguousarray(values).reshape(*values.shape[:2], -1)
            total = maps.sum(axis=2).sum(axis=0, dtype=np.float64)
        else:
            others = tuple(other for other in range(values.ndim) if other != axis)
            total = values.sum(axis=others, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += values.size // values.shape[axis]
