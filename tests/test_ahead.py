"""Prefetched batches: each is returned once, in order, with its position."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from act_pipeline.execution.prefetcher import Prefetcher


class Source:
    """A counter; its position is the number of the last batch."""

    def __init__(self, count: int = 100, fails_at: int | None = None) -> None:
        self.position: dict[str, int] = {}
        self.threads: set[str] = set()
        self.closed = False
        self.batches = self._give(count, fails_at)

    def _give(self, count: int, fails_at: int | None) -> Iterator[dict]:
        try:
            for index in range(count):
                if index == fails_at:
                    raise OSError("the data is gone")
                self.threads.add(threading.current_thread().name)
                self.position = {"images": index}
                yield {"image": index}
        finally:
            self.closed = True

    def ahead(self, ready=lambda batch: batch, **options) -> Prefetcher:
        return Prefetcher(self.batches, ready, lambda: self.position, **options)


@pytest.mark.parametrize("in_advance", [True, False])
def test_batches_come_in_order_with_their_positions(in_advance: bool) -> None:
    source = Source()
    ahead = source.ahead(lambda batch: {**batch, "taught": 2 * batch["image"]}, in_advance=in_advance)
    found = [ahead.take(last=index == 9) for index in range(10)]
    assert found == [({"image": index, "taught": 2 * index}, {"images": index}) for index in range(10)]
    ahead.close()
    assert source.closed and source.position == {"images": 9}  # the eleventh was not read
    assert (threading.current_thread().name in source.threads) == (not in_advance) and len(source.threads) == 1


def test_the_next_batch_is_made_while_a_step_runs() -> None:
    made = [threading.Event() for _ in range(3)]
    ahead = Source().ahead(lambda batch: made[batch["image"]].set() or batch)
    ahead.take()
    assert made[1].wait(timeout=20) and not made[2].is_set()
    ahead.take(last=True)
    ahead.close()
    assert not made[2].is_set()


def test_what_fails_fails_where_its_batch_is_asked_for_and_nothing_hangs() -> None:
    source = Source(fails_at=2)
    ahead = source.ahead()
    assert [ahead.take()[0]["image"], ahead.take()[0]["image"]] == [0, 1]
    with pytest.raises(OSError, match="the data is gone"):
        ahead.take()
    ahead.close()
    assert source.closed


def test_closing_waits_for_the_batch_that_is_being_made() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slow(batch: dict) -> dict:
        if batch["image"] == 1:
            begun.set()
            go_on.wait(timeout=20)
            done.append(batch["image"])
        return batch

    source = Source()
    ahead = source.ahead(slow)
    ahead.take()
    assert begun.wait(timeout=20)  # close() waits only for work that has started
    threading.Timer(0.2, go_on.set).start()
    ahead.close()
    assert done == [1] and source.closed
