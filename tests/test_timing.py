"""The seconds of stages."""

from __future__ import annotations

import pytest

from act_pipeline.core import timing
from act_pipeline.core.timing import timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The readings of the clock, in turn."""
    readings = [10.0, 12.5, 20.0, 21.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_a_stage_that_is_timed_twice_accumulates(clock: list[float]) -> None:
    seconds: dict[str, float] = {"other": 1.0}
    for _ in range(2):
        with timed(seconds, "prepare"):
            pass
    assert seconds == {"other": 1.0, "prepare": 3.5} and not clock


def test_a_stage_that_fails_is_timed_too(clock: list[float]) -> None:
    seconds: dict[str, float] = {}
    with pytest.raises(ValueError), timed(seconds, "train"):
        raise ValueError
    assert seconds == {"train": 2.5} and len(clock) == 2
