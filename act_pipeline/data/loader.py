"""Batches in order, prefetched by threads during inference."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.thread_pool import map_prefetched
from act_pipeline.data.dataset import Dataset

_Batches = Generator[dict[str, np.ndarray], None, None]


class Loader:
    """An iterable over the batches of a data set; every ``iter()`` is one epoch.

    A batch has ``image`` float32 [N, 3, H, W], ``im_shape`` float32 [N, 2] (height, width of the resized image,
    pixels), ``scale_factor`` float32 [N, 2] (resized size / original size, y then x), ``pad_offset`` float32 [N, 2]
    (pixels of padding above and left of the image), ``im_id`` int64 [N] (COCO image ids), and the reader's
    constants. An unreadable image is
    replaced by the next one.

    The order depends only on the seed and the epoch, not on the number of workers. Calling a loader is equivalent to
    ``iter()``, as PaddleSlim's ACT requires.

    Attributes:
        dataset: the data set.
        batch_size: images per batch.
        shuffle: whether to shuffle every epoch.
        drop_last: whether to drop a last, smaller batch.
        workers: number of prefetch threads; 0 reads in the calling thread.
        seed: of the shuffling.
        epoch: number of the epoch that the next ``iter()`` starts; set it to repeat an order.
        position: the end of the last batch; :meth:`seek` resumes there.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, shuffle: bool, drop_last: bool, workers: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.workers = workers
        self.seed = seed
        self.epoch = 0
        self.position = {"epoch": 0, "images": 0}
        self._start = 0
        self._rank, self._world = 0, 1

    def shard(self, rank: int, world: int) -> None:
        """Restrict the loader to the share of one of several processes: every ``world``-th batch of an epoch.

        All shares have the same size; remaining images are left out of the epoch. ``position`` counts within the share.

        Args:
            rank: index of this process.
            world: number of processes.

        Raises:
            UserError: there are fewer images than one batch per process.
        """
        if len(self.dataset) < world * self.batch_size:
            raise UserError(
                f"the training data has {len(self.dataset)} images, expected at least {world * self.batch_size} for "
                f"{world} processes with batches of {self.batch_size}; set EvalReader.batch_size lower in the reader, "
                "or start fewer processes"
            )
        self._rank, self._world = rank, world

    def seek(self, position: Mapping[str, int]) -> None:
        """Start the next ``iter()`` at a position within an epoch, without reading the images before it.

        Args:
            position: a ``position`` of a loader with the same data, seed and batch size.
        """
        self.epoch, self._start = int(position["epoch"]), int(position["images"])
        self.position = {"epoch": self.epoch, "images": self._start}

    def __len__(self) -> int:
        """Return the number of batches per epoch, without images found missing or unreadable so far."""
        images = self.dataset.readable()
        if self._world > 1:
            return images // (self.batch_size * self._world)
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def __call__(self) -> _Batches:
        return iter(self)

    def __iter__(self) -> _Batches:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        if self._world > 1:
            rounds = len(order) // (self.batch_size * self._world)
            order = order[: rounds * self.batch_size * self._world]
            order = order.reshape(rounds, self._world, self.batch_size)[:, self._rank].reshape(-1)
        epoch, start = self.epoch, self._start
        self.epoch, self._start = epoch + 1, 0
        return self._batches(order[start:].tolist(), epoch, start)

    def _batches(self, order: list[int], epoch: int, start: int) -> _Batches:
        samples = []
        images = start
        for sample in self._read_ahead(order) if self.workers else map(self.dataset.__getitem__, order):
            images += 1
            if sample is None:
                continue
            samples.append(sample)
            if len(samples) == self.batch_size:
                batch = self.dataset.batch(samples)
                self.position = {"epoch": epoch, "images": images}
                yield batch
                samples = []
        if samples and not self.drop_last:
            batch = self.dataset.batch(samples)
            self.position = {"epoch": epoch, "images": images}
            yield batch

    def _read_ahead(self, order: list[int]) -> Iterator[dict[str, Any] | None]:
        """Yield the samples in order, prefetching at most a batch and one sample per worker."""
        # Threads suffice, since cv2 releases the GIL while it decodes and resizes.
        yield from map_prefetched(
            self.dataset.__getitem__, order, self.workers, self.batch_size + self.workers, "reader"
        )
