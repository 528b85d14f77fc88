"""Preparation of the next batch while a training step runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional

import numpy as np

Batch = Mapping[str, np.ndarray]


class Prefetcher:
    """Reads batches from a generator and prepares each in a separate thread, one batch in advance.

    A training step on the CPU leaves cores idle during ops that run on one core. The teacher's forward pass, part of
    the preparation, uses this time.
    """

    def __init__(
        self,
        batches: Generator[Batch, None, None],
        ready: Callable[[Batch], Batch],
        position: Callable[[], Mapping[str, Any]],
        in_advance: bool = True,
    ) -> None:
        """Store the source; reading starts with the first :meth:`take`.

        Args:
            batches: the source; with ``in_advance`` it is advanced only in the thread.
            ready: converts a batch to the input of a training step.
            position: returns the position of ``batches`` after its last batch, for resuming.
            in_advance: prefetch one batch; False: prepare each batch in :meth:`take`.
        """
        self._batches, self._ready, self._position, self._in_advance = batches, ready, position, in_advance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next: Optional[Future[tuple[Batch, Mapping[str, Any]]]] = None

    def take(self, last: bool = False) -> tuple[Batch, Mapping[str, Any]]:
        """Return the next prepared batch and the position after it.

        Args:
            last: do not prefetch another batch, because this is the last call.

        Raises:
            StopIteration: there are no more batches.
            Exception: any exception of ``batches`` or ``ready``.
        """
        if not self._in_advance:
            return self._make()
        made = self._next or self._pool.submit(self._make)
        self._next = None
        found = made.result()
        if not last:
            self._next = self._pool.submit(self._make)
        return found

    def close(self) -> None:
        """Wait for the batch that is being prepared, and close the generator."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def _make(self) -> tuple[Batch, Mapping[str, Any]]:
        batch = next(self._batches)
        position = dict(self._position())
        return self._ready(batch), position
