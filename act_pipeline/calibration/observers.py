"""Running statistics of a tensor, in memory that does not grow with the images.

An observer has ``update(values, images)``: ``values`` is a float32 array of any shape, and ``images`` says in how many
equal parts its first axis holds the images of the batch (1: the whole array is one). To gather something else, write
another class with that method and hand it to :func:`act_pipeline.calibration.collector.collect`.
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
# Values looked at together: the temporaries stay in the cache.
_CHUNK = 1 << 17


class Observer(Protocol):
    """What :func:`act_pipeline.calibration.collector.collect` feeds."""

    def update(self, values: np.ndarray, images: int) -> None:
        """Take in a batch; raise :class:`NotFiniteError` if a value is NaN or infinite."""


class NotFiniteError(ValueError):
    """A tensor holds a NaN or an infinite value."""


class AbsMax:
    """The largest absolute value, over all and as a mean over the images.

    Args:
        finite_only: leave infinite values out instead of refusing them: for tensors that are quantized nowhere. The
            anchors of RT-DETR that lie near an edge are masked with infinity, from input sizes of 400 on.

    Attributes:
        abs_max: the largest absolute value so far.
        images: how many images have been seen.
    """

    def __init__(self, finite_only: bool = False) -> None:
        self.finite_only = finite_only
        self.abs_max = 0.0
        self.images = 0
        self._sum = 0.0

    @property
    def mean_abs_max(self) -> float:
        """The mean over the images of each one's largest absolute value."""
        return self._sum / max(self.images, 1)

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`Observer`."""
        if not values.size:
            return
        rows = values.reshape(images, -1)
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)  # NaN stays NaN
        if not np.isfinite(largest).all():
            if np.isnan(largest).any():
                raise NotFiniteError("NaN")
            if not self.finite_only:
                raise NotFiniteError("an infinite value")
            largest = np.where(np.isfinite(rows), np.abs(rows), 0).max(axis=1).astype(np.float64)
        self.abs_max = max(self.abs_max, float(largest.max()))
        self._sum += float(largest.sum())
        self.images += images


class AbsHistogram(AbsMax):
    """Adds a histogram of absolute values, as fine for small values as for large ones.

    A bin is the exponent and the first 11 bits of the mantissa of a float32: 2,048 bins an octave, each at most 1/2,048
    of its value wide. The 24 octaves below the largest value are kept; when a larger one comes, the window moves up and
    what falls out below is counted in the lowest bin, with the zeros. So one outlier of any size costs no resolution
    where the other values are, which a histogram of bins of one width cannot say, and the order of the images does not
    matter. A lowest bin ends at ``abs_max / 2**23`` or below, less than an INT8 step of any useful scale.

    Args:
        sample: how many values of an image are counted at most, evenly spread over the tensor; the largest absolute
            value is always that of all. None: all are counted.
    """

    def __init__(self, sample: int | None = None) -> None:
        super().__init__()
        self.sample = sample
        self._counts = np.zeros(_BINS, np.int64)
        self._base: int | None = None  # the bits of the float32 where the lowest bin begins, without the dropped ones

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`Observer`."""
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
        """Return the values that are counted, float32 [*], contiguous."""
        flat = values.reshape(-1)
        step = flat.size // (self.sample * images) if self.sample else 1
        if step <= 1:
            return flat
        # A step that shares a factor with a dimension would meet some rows, columns or channels alone.
        while any(math.gcd(step, size) > 1 for size in values.shape):
            step += 1
        return np.ascontiguousarray(flat[self.images % step :: step])

    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the lower edges, the upper edges and the counts of the bins that hold anything, in ascending order.

        The lowest bin begins at 0, and no edge lies above ``abs_max``.

        Returns:
            float64 [B], float64 [B], int64 [B].
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
        """Move the window so that the octave of ``abs_max`` is its last."""
        exponent = int(np.float32(self.abs_max).view(np.uint32) >> np.uint32(_FLOAT32_MANTISSA_BITS))
        base = max(exponent - _OCTAVES + 1, 0) * _BINS_PER_OCTAVE
        if self._base is None:
            self._base = base  # only zeros have been counted, if anything, and these stay in the lowest bin
        elif base > self._base:
            moved = min(base - self._base, _BINS)
            counts = np.zeros_like(self._counts)
            counts[: _BINS - moved] = self._counts[moved:]
            counts[0] += self._counts[:moved].sum()
            self._counts, self._base = counts, base


class ChannelMean:
    """The mean of every channel.

    Args:
        axis: of the channels.

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

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`Observer`."""
        axis = self.axis % values.ndim
        if axis == 1 and values.ndim > 2:
            # Maps one by one in float32, which NumPy sums in pairs: three times as fast as float64 throughout.
            maps = np.ascontiguousarray(values).reshape(*values.shape[:2], -1)
            total = maps.sum(axis=2).sum(axis=0, dtype=np.float64)
        else:
            others = tuple(other for other in range(values.ndim) if other != axis)
            total = values.sum(axis=others, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += values.size // values.shape[axis]
