"""Results of threads in order."""

from __future__ import annotations

import threading
import time

import pytest

from act_pipeline.core.thread_pool import map_prefetched


def named() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mapped")]


def test_results_come_in_the_items_order() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    assert list(map_prefetched(slow_first, range(9), 3, 5, "mapped")) == [item * item for item in range(9)]
    assert not named()


def test_no_more_is_taken_than_was_said() -> None:
    taken: list[int] = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    results = map_prefetched(str, items(), 2, 4, "mapped")
    assert next(results) == "0" and len(taken) == 4
    assert next(results) == "1" and len(taken) == 5
    results.close()


def test_the_threads_have_ended_when_the_consumer_stops_early() -> None:
    running = threading.Event()

    def slow(item: int) -> int:
        if item == 1:
            running.set()
            time.sleep(0.2)
        return item

    results = map_prefetched(slow, range(9), 2, 3, "mapped")
    assert next(results) == 0
    assert running.wait(5) and named()
    results.close()
    assert not named()


def test_an_error_comes_where_its_result_would() -> None:
    results = map_prefetched(lambda item: 1 // item, [2, 1, 0, 3], 2, 4, "mapped")
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not named()
