"""A planned row with its process and its measurements so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from act_pipeline.benchmark.plan import Candidate
from act_pipeline.benchmark.rows import Memory
from act_pipeline.benchmark.worker import Worker, WorkerFailed
from act_pipeline.evaluation.throughput import Burst


@dataclass
class Run:
    """A candidate and its measurements so far; for those without a comment see :class:`Row`.

    Attributes:
        candidate: the planned row.
        worker: its process; None before it is loaded and after it failed.
        seconds: duration of each round.
        device_ms: the same by the device's clock in ms, where the engine has one.
        unsettled: number of runs after which the engine's threads did not go to sleep.
        bursts: with ``--throughput``, the runs of each round.
    """

    candidate: Candidate
    worker: Worker | None = None
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    unsettled: int = 0
    first_start_seconds: float | None = None
    start_seconds: float | None = None
    memory: Memory | None = None
    map: float | None = None
    map50: float | None = None
    miou: float | None = None
    images: int | None = None
    map_failure: str | None = None
    bursts: list[Burst] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def running(self) -> Worker:
        """Its process, once it was loaded and until it fails."""
        assert self.worker is not None, f"{self.label} was not loaded, or has failed"
        return self.worker

    def fail(self, reason: object) -> None:
        self.failure = str(reason)
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


@contextlib.contextmanager
def closing(runs: Sequence[Run]) -> Iterator[None]:
    """End all worker processes on exit, also after an error."""
    try:
        yield
    except BaseException:
        for run in runs:
            if run.worker is not None:
                run.worker.kill()
        raise
    for run in runs:
        if run.worker is not None:
            run.worker.close()


def load(runs: Sequence[Run], inputs: Path, say: Callable[[str], None], twice: bool = True) -> None:
    """Load every engine in its own process, one after the other.

    Args:
        runs: those without a failure are loaded, and have a failure afterwards if it did not work.
        inputs: a ``.npz`` file of the batches, ``<name>`` -> [batches, N, ...].
        say: is called with one line per engine.
        twice: load each first in a process that ends again. The first load exports the model or builds the engine,
            whose files stay on disk, so these steps do not count in the start-up time and memory of the second.
    """
    for run in runs:
        if run.failure is not None:
            continue
        say(f"loading {run.label}")
        create = run.candidate.create
        assert create is not None, f"{run.label} is not refused, and nothing makes it"
        try:
            if twice:
                run.worker = first = Worker(run.label, create, inputs)
                run.first_start_seconds = round(first.load().start_seconds, 3)
                first.close()
            run.worker = Worker(run.label, create, inputs)
            run.start_seconds = round(run.running.load().start_seconds, 3)
        except WorkerFailed as error:
            run.fail(error)
