"""Observers of an activation's rows, for algorithms that need more than the distribution of its values.

A row is a vector along the axis of the channels, which a matmul, or a position of a convolution's kernel, multiplies
with a weight ``[channels, out]``.
"""

from __future__ import annotations

import numpy as np

from act_pipeline.calibration.observers import NotFiniteError


class ChannelAbsMax:
    """Record the largest absolute value of every channel, image by image.

    It stores ``channels`` float32 values an image, so it suits hundreds of images, not hundreds of thousands.

    Args:
        axis: the axis of the channels.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._seen: list[np.ndarray] = []

    @property
    def by_image(self) -> np.ndarray:
        """Largest absolute values by image, float32 [images, channels]; [0, 0] if nothing was seen."""
        return np.concatenate(self._seen) if self._seen else np.zeros((0, 0), np.float32)

    @property
    def abs_max(self) -> np.ndarray:
        """Largest absolute values over all images, float32 [channels]; empty if nothing was seen."""
        return self.by_image.max(axis=0) if self._seen else np.zeros(0, np.float32)

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch; see :meth:`act_pipeline.calibration.observers.Observer.update`."""
        if not values.size:
            return
        rows = _rows(values, self.axis)
        rows = rows.reshape(images, -1, rows.shape[-1])
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)  # NaN stays NaN
        if not np.isfinite(largest).all():
            raise NotFiniteError("NaN" if np.isnan(largest).any() else "an infinite value")
        self._seen.append(largest)


class RowSample:
    """Draw a uniform random sample of rows, in memory that does not grow with the number of images.

    Every row draws a random number, and the rows with the smallest numbers are kept. The sample does not depend on the
    batch size, and the total number of rows need not be known in advance.

    Args:
        rows: the number of rows to keep.
        seed: seed of the random numbers.
        axis: the axis of the channels.

    Attributes:
        rows, axis: as given.
        values: the sample, float32 [at most ``rows``, channels]; [0, 0] if nothing was seen.
        image: int64 [at most ``rows``], the index of each row's image, from 0.
    """

    def __init__(self, rows: int, seed: int = 0, axis: int = -1) -> None:
        self.rows, self.axis = rows, axis
        self.values = np.zeros((0, 0), np.float32)
        self.image = np.zeros(0, np.int64)
        self._drawn = np.zeros(0)
        self._random = np.random.default_rng(seed)
        self._images = 0

    def update(self, values: np.ndarray, images: int) -> None:
        """Add the values of a batch; see :meth:`act_pipeline.calibration.observers.Observer.update`."""
        if not values.size:
            return
        rows = _rows(values, self.axis)
        drawn = self._random.random(len(rows))
        image = self._images + np.arange(len(rows)) // (len(rows) // images)
        self._images += images
        if len(self._drawn) == self.rows:  # avoids copying the rows that cannot enter the sample
            wanted = drawn < self._drawn.max()
            rows, drawn, image = rows[wanted], drawn[wanted], image[wanted]
        if not len(self._drawn):
            self.values = np.zeros((0, rows.shape[1]), np.float32)
        drawn = np.concatenate([self._drawn, drawn])
        kept = np.sort(np.argsort(drawn)[: self.rows])
        self.values = np.concatenate([self.values, rows.astype(np.float32, copy=False)])[kept]
        self.image, self._drawn = np.concatenate([self.image, image])[kept], drawn[kept]


def _rows(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the values as rows of channels, [rows, channels]; a copy unless the axis is the last one."""
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
