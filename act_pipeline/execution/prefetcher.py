"""Batches made ready while the step before them runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional

import numpy as np

Batch = Mapping[str, np.ndarray]


class Prefetcher:
    """Takes batches from a generator and makes each ready in a thread of its own, one batch in advance.

    A step on the CPU leaves cores idle wherever an op computes on one of them: the teacher finds its time there.
    """

    def __init__(
        self,
        batches: Generator[Batch, None, None],
        ready: Callable[[Batch], Batch],
        position: Callable[[], Mapping[str, Any]],
        in_advance: bool = True,
    ) -> None:
        """Start nothing yet.

        Args:
            batches: is only advanced in the thread.
            ready: makes of a batch what a step takes.
            position: where ``batches`` is after the batch that it gave last.
            in_advance: False: a batch is made ready when it is asked for.
        """
        self._batches, self._ready, self._position, self._in_advance = batches, ready, position, in_advance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next: Optional[Future[tuple[Batch, Mapping[str, Any]]]] = None

    def take(self, last: bool = False) -> tuple[Batch, Mapping[str, Any]]:
        """Return the next batch and the position after it.

        Args:
            last: no batch will be asked for after this one.

        Raises:
            StopIteration: there are no more.
            Exception: whatever reading or ``ready`` raised.
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
        """Wait for the batch that is being made, and end the generator."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def _make(self) -> tuple[Batch, Mapping[str, Any]]:
        batch = next(self._batches)
        position = dict(self._position())
        return self._ready(batch), position
