"""Requests that run in the float model and in a probe of the ranges too, in a thread: the answers do not wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.serving.ranges import RangeProbe, RangeShares

# Runs the float model on what the server gave to `offer`, and returns bbox [K, 6] of the one image; None: there is no
# float model of this version.
FloatModel = Callable[[Any], Optional[np.ndarray]]
Report = Callable[[int, np.ndarray, np.ndarray], None]
RangeReport = Callable[[int, Union[RangeShares, str]], None]
# Seconds of a probe that count as nothing, and the longest pause after one, whose first run loads it.
_SHORT, _LONGEST_PAUSE = 0.01, 60.0


@dataclass(frozen=True)
class _Job:
    version: int
    inputs: Any
    detections: np.ndarray


class Shadow:
    """Runs requests once more from a queue of limited length; what does not fit is dropped and counted."""

    def __init__(
        self,
        run: Optional[FloatModel],
        report: Report,
        failed: Callable[[int], None],
        length: int = 16,
        probe: Optional[RangeProbe] = None,
        report_ranges: RangeReport = lambda version, found: None,
        probe_time: float = 1.0,
    ) -> None:
        """Start the thread.

        Args:
            run: the float model; None: there is none. Its exceptions are counted, and end nothing.
            report: called with the version, the float model's and the version's detections, ``[K, 6]`` each.
            failed: called with the version when the float model failed.
            length: the most requests that wait; each holds its inputs in memory.
            probe: tells how many activations are beyond their ranges; None: nothing does.
            report_ranges: called with the version and what the probe returned.
            probe_time: the largest share of the time that the probe may run, in (0, 1]; others are not probed.
        """
        self._run, self._report, self._failed = run, report, failed
        self._probe, self._report_ranges = probe, report_ranges
        self._probe_time, self._probe_again = probe_time, 0.0
        self._queue: queue.Queue[_Job] = queue.Queue(length)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, version: int, inputs: Any, detections: np.ndarray) -> bool:
        """Queue a request; returns at once, False if it was dropped.

        Args:
            version: the version that answered.
            inputs: what ``run`` takes; it must not be changed afterwards.
            detections: the answer, ``[K, 6]``.
        """
        if self._closing.is_set():
            return False
        try:
            self._queue.put_nowait(_Job(version, inputs, detections))
        except queue.Full:
            return False
        return True

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return self._queue.qsize()

    def drain(self) -> None:
        """Wait until the queued requests have run."""
        self._queue.join()

    def close(self, seconds: float = 10.0) -> None:
        """Forget the queued requests, and wait for the running one; a second call does nothing.

        Args:
            seconds: how long to wait.
        """
        self._closing.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                job = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                self._compare(job)
                self._look_at_ranges(job)
            finally:
                self._queue.task_done()

    def _look_at_ranges(self, job: _Job) -> None:
        if self._probe is None or time.monotonic() < self._probe_again:
            return
        started = time.monotonic()
        try:
            found = self._probe(job.inputs)
        except Exception:  # as below
            self._failed(job.version)
            return
        self._report_ranges(job.version, found)
        took = time.monotonic() - started
        if took > _SHORT:
            pause = took * (1 / self._probe_time - 1)
            self._probe_again = time.monotonic() + min(pause, _LONGEST_PAUSE)

    def _compare(self, job: _Job) -> None:
        if self._run is None:
            return
        try:
            found = self._run(job.inputs)
            if found is None:
                return
            reference = as_detections(found)
        except Exception:  # whatever the runtime raises: the answers do not depend on it
            self._failed(job.version)
            return
        self._report(job.version, reference, job.detections)


def as_detections(bbox: Any) -> np.ndarray:
    """Return ``bbox`` as float64 [K, 6].

    Raises:
        ValueError: it has another shape, or is not finite.
    """
    found = np.asarray(bbox, np.float64)
    if found.size == 0:
        return found.reshape(0, 6)
    if found.ndim != 2 or found.shape[1] != 6:
        raise ValueError(f"bbox is {list(found.shape)}, expected [K, 6]")
    if not np.isfinite(found).all():
        raise ValueError("bbox holds NaN or infinity")
    return found
