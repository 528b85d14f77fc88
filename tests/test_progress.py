"""Progress on a terminal and in a log file: what is written to stderr, and when."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest

from act_pipeline.core import progress
from act_pipeline.core.progress import Progress, each

PACKAGE = Path(progress.__file__).parents[1]


class Clock:
    """Stands for ``time`` in the module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def take_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr; in the test itself, since pytest puts its own stderr back after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    return terminal


def test_a_log_file_gets_a_line_every_half_minute_and_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each(range(100), "evaluate", "image"):
        clock.now += 0.7
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 43 of 100 (43%), 30 s, 1.4 image/s, about 40 s left",
        "evaluate: 86 of 100 (86%), 60 s, 1.4 image/s, about 10 s left",
        "evaluate: 100 of 100 (100%), 70 s, 1.4 image/s",
    ]


def test_a_short_loop_writes_no_line_to_a_log_file(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each(range(100), "evaluate", "image"):
        clock.now += 0.04
    assert capsys.readouterr().err == ""


def test_a_resumed_loop_of_slow_units_with_notes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", "iteration", 10, done=6) as bar:
        clock.now += 20
        bar.update(1, loss="0.5")
        clock.now += 20
        bar.update(1, loss="0.4")
    assert capsys.readouterr().err.splitlines() == [
        "train: 8 of 10 (80%), 40 s, 20.0 s/iteration, about 40 s left, loss 0.4",
    ]


@pytest.mark.parametrize(
    ("total", "line"),
    [(8_000_000, "m: 4.0 of 8.0 MB (50%), 40 s, 0.1 MB/s, about 40 s left"), (None, "m: 4.0 MB, 40 s, 0.1 MB/s")],
)
def test_bytes(total: int | None, line: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("m", "B", total)
    clock.now += 40
    bar.update(4_000_000)
    assert capsys.readouterr().err.splitlines() == [line]


def test_nothing_is_written_if_not_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each(range(3), "evaluate", "image", shown=False):
        clock.now += 60
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_that_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    with Progress("evaluate", "image", 2) as bar:
        bar.update(2)
    assert "evaluate:" in terminal.getvalue() and "\r" in terminal.getvalue() and "\n" not in terminal.getvalue()


def test_a_warning_is_a_line_of_its_own_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = take_terminal(monkeypatch)
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's; a command has none
    with Progress("evaluate", "image", 2) as bar:
        bar.update()
        logging.getLogger("act_pipeline.test").warning("num_classes is 5")
        bar.update()
    shown = [re.split("\r", line)[-1] for line in terminal.getvalue().split("\n")]
    assert "num_classes is 5" in shown


def test_no_other_module_draws_bars() -> None:
    found = [
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.M)
    ]
    assert found == ["progress.py"]
