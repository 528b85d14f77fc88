"""Work in threads whose results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int, name: str
) -> Iterator[Result]:
    """Yield ``function`` of each item in the items' order; the threads have ended when the iterator has.

    Args:
        function: runs in several threads at once.
        items: are taken as threads come to need them.
        threads: how many there are.
        ahead: how many items at most are taken before the result of the first is asked for.
        name: of the threads.

    Raises:
        Exception: whatever ``items`` or ``function`` raised.
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
        # Whatever ends this, also a consumer that stops early: what the threads use may be closed now.
        pool.shutdown(wait=True, cancel_futures=True)
