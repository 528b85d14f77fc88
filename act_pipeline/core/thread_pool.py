"""A parallel map over threads with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_prefetched(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int, name: str
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item in order, computed in threads; the threads end with the iterator.

    Args:
        function: called in several threads in parallel.
        items: consumed in the calling thread, at most ``ahead`` items before the next result is yielded.
        threads: number of threads.
        ahead: number of items to prefetch.
        name: name prefix of the threads.

    Yields:
        The results in the order of ``items``.

    Raises:
        Exception: any exception of ``items`` or ``function``.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Also if the consumer stops early: afterwards the caller may close what the threads use.
        pool.shutdown(wait=True, cancel_futures=True)
