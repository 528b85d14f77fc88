"""Progress of long loops on stderr: a bar on a terminal, else a line from time to time (log files, CI, notebooks)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Optional, TypeVar

LINE_INTERVAL_S = 30.0
# There may be hundreds of loops shorter than this, such as the evaluations of accuracy control on a few images.
SHORT_LOOP_S = 5.0

_T = TypeVar("_T")


class Progress:
    """The progress of one loop, as a context manager; loops may be nested.

    On a terminal it is a bar of tqdm. Elsewhere it is one line at most every :data:`LINE_INTERVAL_S` seconds and one at
    the end; a loop of less than :data:`SHORT_LOOP_S` seconds writes none.

    Attributes:
        done: number of finished units.
        total: number of units; None if unknown. It may be changed.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: Optional[int] = None,
        *,
        done: int = 0,
        shown: bool = True,
        stays: bool = False,
    ) -> None:
        """Start the clock.

        Args:
            what: name of the loop, such as ``evaluate``.
            unit: what is counted, such as ``image``; ``B`` for bytes.
            total: number of units, including ``done``; None if unknown.
            done: number of units that an earlier run has finished.
            shown: whether anything is written.
            stays: whether the bar stays on the terminal when the loop has ended.
        """
        self.total = total
        self._what, self._unit, self.done, self._before, self._notes = what, unit, done, done, ""
        self._start = self._written = time.monotonic()
        self._written_done = -1
        self._lines = shown and not sys.stderr.isatty()
        self._bar: Any = None
        if shown and not self._lines:
            from tqdm import tqdm

            _log_above_bars()
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=unit == "B", leave=stays)

    def update(self, count: int = 1, **notes: str) -> None:
        """Count finished units.

        Args:
            count: how many.
            notes: values to show after the count from now on.
        """
        self.done += count
        self._notes = "".join(f", {name} {value}" for name, value in notes.items()) or self._notes
        if self._bar is not None:
            self._bar.total = self.total
            if notes:
                self._bar.set_postfix(notes, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._written >= LINE_INTERVAL_S:
            self._write_line()

    def close(self) -> None:
        """Remove the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self.done != self._written_done and time.monotonic() - self._start >= SHORT_LOOP_S:
            self._write_line()
        self._bar, self._lines = None, False

    def _write_line(self) -> None:
        self._written, self._written_done = time.monotonic(), self.done
        seconds, counted = self._written - self._start, self.done - self._before
        unit, scale = (" MB", 1e6) if self._unit == "B" else ("", 1)
        count = f"{self.done / scale:.{1 if unit else 0}f}"
        if self.total:
            count = f"{count} of {self.total / scale:.{1 if unit else 0}f}{unit} ({self.done / self.total:.0%})"
        else:
            count += unit or f" {self._unit}"
        left = f", about {seconds / counted * (self.total - self.done):.0f} s left" if self.total and counted else ""
        left = left if self.total and self.done < self.total else ""
        line = f"{self._what}: {count}, {seconds:.0f} s{_rate(counted, seconds, self._unit)}{left}{self._notes}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def each(
    items: Iterable[_T], what: str, unit: str, total: Optional[int] = None, *, done: int = 0, shown: bool = True
) -> Iterator[_T]:
    """Yield the items and show how many the caller has finished; see :class:`Progress`.

    Args:
        items: the items.
        what, unit, done, shown: as in :class:`Progress`.
        total: number of items, including ``done``; None for ``len(items)`` plus ``done``, if ``items`` has a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items) + done
    with Progress(what, unit, total, done=done, shown=shown) as progress:
        for item in items:
            yield item
            progress.update()


def _rate(counted: int, seconds: float, unit: str) -> str:
    if not counted or seconds <= 0:
        return ""
    if unit == "B":
        return f", {counted / seconds / 1e6:.1f} MB/s"
    return f", {counted / seconds:.1f} {unit}/s" if counted >= seconds else f", {seconds / counted:.1f} s/{unit}"


def end_bars() -> None:
    """Remove the bars of loops that an exception has ended and nothing has closed, such as those of generators."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        # tqdm has no public list of its bars.
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


class _AboveBars(logging.Handler):
    """Writes log lines to stderr above the bars, which would otherwise be drawn over them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _log_above_bars() -> None:
    """Replace Python's handler of last resort, which writes the warnings of a program that configures no logging."""
    if not isinstance(logging.lastResort, _AboveBars):
        logging.lastResort = _AboveBars(logging.WARNING)
