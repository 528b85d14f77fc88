"""Observers of an activation's rows, for whoever needs more than the distribution of its values.

A row is the vector along the last axis: what a matmul with a weight ``[channels, out]`` multiplies.
"""

from __future__ import annotations

import numpy as np

from act_pipeline.calibration.observers import NotFiniteError


class ChannelAbsMax:
    """The largest absolute value of every channel of the last axis, image by image.

    It keeps ``channels`` float32 values an image: let it see hundreds of images, not hundreds of thousands.
    """

    def __init__(self) -> None:
        self._seen: list[np.ndarray] = []

    @property
    def by_image(self) -> np.ndarray:
        """float32 [images, channels]; [0, 0] if nothing was seen."""
        return np.concatenate(self._seen) if self._seen else np.zeros((0, 0), np.float32)

    @property
    def abs_max(self) -> np.ndarray:
        """float32 [channels], over all images; empty if nothing was seen."""
        return self.by_image.max(axis=0) if self._seen else np.zeros(0, np.float32)

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`act_pipeline.calibration.observers.Observer`."""
        if not values.size:
            return
        rows = values.reshape(images, -1, values.shape[-1])
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)  # NaN stays NaN
        if not np.isfinite(largest).all():
            raise NotFiniteError("NaN" if np.isnan(largest).any() else "an infinite value")
        self._seen.append(largest)


class RowSample:
    """A sample of rows, each as likely as any other, in memory that does not grow with the images.

    Every row draws a number, and the rows with the least numbers are kept; so neither the size of a batch nor how many
    rows are to come matters.

    Args:
        rows: how many to keep.
        seed: of the numbers.

    Attributes:
        values: float32 [at most rows, channels]; [0, 0] if nothing was seen.
        image: int64 [at most rows], the image, counted from 0, of each.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows = rows
        self.values = np.zeros((0, 0), np.float32)
        self.image = np.zeros(0, np.int64)
        self._drawn = np.zeros(0)
        self._random = np.random.default_rng(seed)
        self._images = 0

    def update(self, values: np.ndarray, images: int) -> None:
        """See :class:`act_pipeline.calibration.observers.Observer`."""
        if not values.size:
            return
        rows = values.reshape(-1, values.shape[-1])
        drawn = self._random.random(len(rows))
        image = self._images + np.arange(len(rows)) // (len(rows) // images)
        self._images += images
        if len(self._drawn) == self.rows:  # only the chosen few of a large tensor are copied
            wanted = drawn < self._drawn.max()
            rows, drawn, image = rows[wanted], drawn[wanted], image[wanted]
        if not len(self._drawn):
            self.values = np.zeros((0, rows.shape[1]), np.float32)
        drawn = np.concatenate([self._drawn, drawn])
        kept = np.sort(np.argsort(drawn)[: self.rows])
        self.values = np.concatenate([self.values, rows.astype(np.float32, copy=False)])[kept]
        self.image, self._drawn = np.concatenate([self.image, image])[kept], drawn[kept]
