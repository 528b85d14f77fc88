"""An engine in its own process, idle except while it executes a command.

A single process for all engines would not work: the engines would share their peak memory. Also, Paddle's OpenMP
threads spin for 200 ms after a run, ONNX Runtime's for 40 ms (OpenVINO's for 1 ms), and would occupy the cores during
the next engine's run. A worker replies only when its threads are asleep, so the next engine finds an idle machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from act_pipeline.benchmark.rows import Memory
from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import Engine, parallel_requests

if TYPE_CHECKING:
    from act_pipeline.evaluation.throughput import Burst

# Untimed runs before each timed run: other engines have filled the caches with their weights in the meantime, and this
# engine's threads are asleep. Compared with a tight loop, latencies of RT-DETR at 256 (5th percentiles, 2 cores, 3
# runtimes) were up to 7% longer with no untimed run, up to 4% longer with one, and equal within 2% with two.
UNTIMED_RUNS = 2
_SETTLE_SECONDS, _SETTLE_STEP_SECONDS, _IDLE_SHARE = 0.5, 0.005, 0.1
_END_SECONDS = 10

CreateEngine = Callable[[], Engine]


class WorkerFailed(Exception):
    """The engine raised an error or its process ended; the message is one line."""


@dataclass(frozen=True)
class Loaded:
    """A loaded engine.

    Attributes:
        name, precision, device, threads: of the engine.
        start_seconds: duration of creating the engine and of its first run, including imports.
        versions: library -> version.
        settings: settings that the engine reports.
        artifact, artifact_bytes, artifact_hash: path, size and hash of what it loaded; None if it does not tell.
        requests: from how many threads its ``run`` may be called at the same time.
    """

    name: str
    precision: str
    device: str
    threads: int
    start_seconds: float
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    artifact: str | None
    artifact_bytes: int | None
    artifact_hash: str | None
    requests: int = 1


@dataclass(frozen=True)
class TimedRun:
    """A timed run.

    Attributes:
        seconds: duration of ``engine.run``.
        device_ms: the duration by the device's clock; None if the engine does not provide it.
        settled: whether the engine's threads went to sleep afterwards.
    """

    seconds: float
    device_ms: float | None
    settled: bool


class Worker:
    """An :class:`act_pipeline.engines.interface.Engine` in its own process.

    ``run`` sends the arrays to the process, so that :func:`act_pipeline.evaluation.evaluate` can use a worker as an
    engine; ``timed_run`` uses arrays that the process has loaded.

    Attributes:
        label: for messages.
        name, precision, device, threads: of the engine, after ``load``.
        loaded: the result of ``load``; None before.
    """

    def __init__(self, label: str, create: CreateEngine, inputs: Path) -> None:
        """Start the process, without loading the engine.

        Args:
            label: for messages.
            create: creates the engine in the process; must be picklable.
            inputs: a ``.npz`` file of the batches, ``<name>`` -> [batches, N, ...].

        Raises:
            WorkerFailed: the process did not start.
        """
        self.label = label
        self.name = self.precision = self.device = ""
        self.threads = 0
        self.loaded: Loaded | None = None
        context = multiprocessing.get_context("spawn")  # a fork would inherit what the parent has loaded
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, create, str(inputs)), daemon=True, name=label)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self._process.kill()
            raise

    def load(self) -> Loaded:
        """Create the engine, run it once, and return ``loaded``.

        Raises:
            WorkerFailed: see :class:`WorkerFailed`.
        """
        loaded: Loaded = self._ask("load")
        self.loaded = loaded
        self.name, self.precision, self.device, self.threads = (
            loaded.name, loaded.precision, loaded.device, loaded.threads,
        )  # fmt: skip
        return loaded

    def warm_up(self, runs: int) -> None:
        """Run the engine ``runs`` times without timing."""
        self._ask("warm_up", runs)

    def timed_run(self, index: int) -> TimedRun:
        """Time one run, after untimed runs on the same batch.

        Args:
            index: index of the batch, modulo their number.
        """
        return self._ask("timed_run", index)

    def timed_burst(self, seconds: float) -> Burst:
        """Time the engine under load: as many requests in parallel as it takes, after untimed runs of each.

        Args:
            seconds: duration of the load.
        """
        return self._ask("timed_burst", seconds)

    def memory(self) -> Memory:
        """Return the peak memory of the process."""
        return self._ask("memory")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine on given inputs, see :meth:`act_pipeline.engines.interface.Engine.run`."""
        return self._ask("run", dict(inputs))

    def versions(self) -> dict[str, str]:
        """Return the library versions that the engine reported; empty before ``load``."""
        return dict(self.loaded.versions) if self.loaded is not None else {}

    def close(self) -> None:
        """End the process; further calls have no effect."""
        with contextlib.suppress(OSError):
            self._pipe.send(("close",))
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()  # SIGKILL: on SIGTERM Paddle prints a stack trace
            self._process.join()

    def kill(self) -> None:
        """End the process immediately."""
        self._process.kill()
        self.close()

    def _ask(self, *command: Any) -> Any:
        try:
            self._pipe.send(command)
        except OSError:
            raise WorkerFailed(self._ended()) from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerFailed(self._ended()) from None
        if not succeeded:
            raise WorkerFailed(" ".join(str(answer).split()))
        return answer

    def _ended(self) -> str:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"its process was ended by {name}{hint}"
        return f"its process ended with exit code {code}"


def _serve(pipe: Any, create: CreateEngine, inputs: str) -> None:
    """Execute commands from the pipe until it closes; runs in the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    sys.stdout.flush()
    os.dup2(2, 1)  # keeps output of the runtimes out of the table
    with np.load(inputs) as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    count = len(stored["image"])
    batches = [{name: array[index] for name, array in stored.items()} for index in range(count)]
    bare_bytes = peak_bytes()
    engine: Any = None
    pipe.send((True, None))
    while True:
        try:
            command, *arguments = pipe.recv()
        except (EOFError, OSError):
            break
        if command == "close":
            break
        try:
            answer: Any = None
            if command == "load":
                started = time.perf_counter()
                engine = create()
                engine.run(batches[0])
                answer = _description(engine, time.perf_counter() - started)
            elif command == "warm_up":
                for index in range(arguments[0]):
                    engine.run(batches[index % count])
            elif command == "timed_run":
                answer = _timed_run(engine, batches[arguments[0] % count])
            elif command == "timed_burst":
                from act_pipeline.evaluation.throughput import measure_throughput

                answer = measure_throughput(engine, batches, parallel_requests(engine), arguments[0], UNTIMED_RUNS)
            elif command == "memory":
                peak = peak_bytes()
                answer = Memory(bare_bytes, peak, peak - bare_bytes)
            elif command == "run":
                answer = engine.run(arguments[0])
            if command != "run":
                _settle()
            reply = (True, answer)
        except UserError as error:
            reply = (False, str(error))
        except Exception as error:  # an engine's failure must not end the others
            reply = (False, f"{type(error).__name__}: {error}")
        try:
            pipe.send(reply)
        except OSError:
            break
    if engine is not None:
        engine.close()


def _timed_run(engine: Any, batch: Mapping[str, np.ndarray]) -> TimedRun:
    for _ in range(UNTIMED_RUNS):
        engine.run(batch)
    start = time.perf_counter()
    engine.run(batch)
    seconds = time.perf_counter() - start
    return TimedRun(seconds, getattr(engine, "last_device_ms", None), _settle())


def _settle() -> bool:
    """Wait at most half a second until this process's threads are asleep; return whether they are."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        cpu, clock = time.process_time(), time.monotonic()
        time.sleep(_SETTLE_STEP_SECONDS)
        if time.process_time() - cpu < _IDLE_SHARE * (time.monotonic() - clock):
            return True
    return False


def _description(engine: Any, start_seconds: float) -> Loaded:
    artifact = getattr(engine, "artifact", None)
    return Loaded(
        name=engine.name,
        precision=engine.precision,
        device=engine.device,
        threads=engine.threads,
        start_seconds=start_seconds,
        versions=dict(engine.versions()),
        settings=dict(getattr(engine, "settings", None) or {}),
        artifact=str(getattr(artifact, "path", None) or artifact.directory) if artifact else None,
        artifact_bytes=artifact.bytes if artifact else None,
        artifact_hash=artifact.content_hash() if artifact else None,
        requests=parallel_requests(engine),
    )


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux ``VmHWM`` is used, because ``ru_maxrss`` is inherited from the parent process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
