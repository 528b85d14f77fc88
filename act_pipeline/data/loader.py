"""Batches in order, read ahead by threads while the network computes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.thread_pool import map_ahead
from act_pipeline.data.dataset import Dataset

_Batches = Generator[dict[str, np.ndarray], None, None]


class Loader:
    """An iterable over the batches of a data set; every ``iter()`` is one epoch.

    A batch has ``image [N, 3, H, W]`` float32, ``im_shape [N, 2]`` float32 (height, width of the network's input,
    pixels), ``scale_factor [N, 2]`` float32 (input size / original size, y then x) and ``im_id [N]`` int64 (COCO image
    ids). Unreadable images are left out, and the next image takes the place.

    The order depends on the seed and the epoch alone, not on the number of workers. Calling a loader is the same as
    ``iter()``, which is the form PaddleSlim's ACT wants.

    Attributes:
        dataset: the data set.
        batch_size, shuffle, drop_last, workers, seed: as given.
        epoch: the number of the epoch that the next ``iter()`` gives; set it to repeat an order.
        position: where the last batch ended; :meth:`seek` goes on from there.
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
        """Give one of several processes its share from now on: of an epoch's order, every ``world``-th batch.

        All shares are of one size: images that are left over sit the epoch out. ``position`` counts within the share.

        Raises:
            UserError: there are too few images.
        """
        if len(self.dataset) < world * self.batch_size:
            raise UserError(
                f"the training data has {len(self.dataset)} images, expected at least {world * self.batch_size} for "
                f"{world} processes with batches of {self.batch_size}; set EvalReader.batch_size lower in the reader, "
                "or start fewer processes"
            )
        self._rank, self._world = rank, world

    def seek(self, position: Mapping[str, int]) -> None:
        """Let the next ``iter()`` give the rest of an epoch, without reading the images before it.

        Args:
            position: a ``position`` that a loader of the same data, seed and batch size had.
        """
        self.epoch, self._start = int(position["epoch"]), int(position["images"])
        self.position = {"epoch": self.epoch, "images": self._start}

    def __len__(self) -> int:
        """Return the number of batches an epoch, less those that files found unreadable later will cost."""
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
        """Yield the samples in order, holding at most a batch and one sample a worker in advance."""
        # Threads, not processes: cv2 leaves the interpreter lock while it decodes and resizes.
        yield from map_ahead(self.dataset.__getitem__, order, self.workers, self.batch_size + self.workers, "reader")
