"""An engine in a process of its own, which computes when it is told to and otherwise waits.

One process for all engines would not do: they would share their peak memory, and Paddle's OpenMP threads spin for
200 ms after a run, ONNX Runtime's for 40 ms (OpenVINO's for 1 ms), and so take the cores from whatever runs next. Here
a worker answers only when its threads have gone to sleep, and the next engine finds the machine idle.
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
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import Engine

# Runs before the timed one of each turn: the turns of the others have put their own weights into the caches and this
# engine's threads to sleep. Against a run of its own in a tight loop, the times of RT-DETR at 256 (fifth percentiles, 2
# cores, 3 runtimes) were up to 7% longer with none, up to 4% with one, and the same within 2% with two.
UNTIMED_RUNS = 2
_SETTLE_SECONDS, _SETTLE_STEP_SECONDS, _IDLE_SHARE = 0.5, 0.005, 0.1
_END_SECONDS = 10

CreateEngine = Callable[[], Engine]


class WorkerFailed(Exception):
    """The engine refused, or its process ended; in one line."""


class Worker:
    """An :class:`act_pipeline.engines.interface.Engine` in a process of its own.

    ``run`` sends the arrays over, so that :func:`act_pipeline.evaluation.evaluate` takes a worker as it takes an
    engine; ``timed_run`` uses arrays that the worker has.

    Attributes:
        label: for messages.
        name, precision, device, threads: the engine's, after ``load``.
        loaded: what else ``load`` found out: ``start_seconds`` (from nothing imported to the first result),
            ``artifact_bytes``, ``artifact_hash``, ``artifact`` (path), ``settings``, ``versions``.
    """

    def __init__(self, label: str, create: CreateEngine, inputs: Path) -> None:
        """Start the process; nothing is loaded yet.

        Args:
            label: for messages.
            create: makes the engine, in the process; must be picklable.
            inputs: a ``.npz`` file of the batches, ``<name>`` -> [batches, N, ...].

        Raises:
            WorkerFailed: it did not come up.
        """
        self.label = label
        self.name = self.precision = self.device = ""
        self.threads = 0
        self.loaded: dict[str, Any] = {}
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

    def load(self) -> dict[str, Any]:
        """Make the engine and run it once; see ``loaded``."""
        self.loaded = self._ask("load")
        for attribute in ("name", "precision", "device", "threads"):
            setattr(self, attribute, self.loaded[attribute])
        return self.loaded

    def warm_up(self, runs: int) -> None:
        """Run so often without looking at the clock."""
        self._ask("warm_up", runs)

    def timed_run(self, index: int) -> dict[str, Any]:
        """Run on the batch of this index (modulo their number), after untimed runs on it.

        Returns:
            ``seconds`` of ``engine.run``; ``device_ms`` if the engine has it from its device's own clock, else None;
            ``settled``: whether its threads went to sleep afterwards.
        """
        return self._ask("timed_run", index)

    def memory(self) -> dict[str, int]:
        """Return what the process has held.

        Returns:
            ``peak_bytes`` so far; ``bare_bytes``, the same before the engine was loaded (Python, this package and the
            batches); ``engine_bytes``, the difference: the runtime, the model and its buffers.
        """
        return self._ask("memory")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        return self._ask("run", dict(inputs))

    def versions(self) -> dict[str, str]:
        """Return what the engine said of itself."""
        return dict(self.loaded.get("versions", {}))

    def close(self) -> None:
        """End the process; a second call does nothing."""
        with contextlib.suppress(OSError):
            self._pipe.send(("close",))
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()  # SIGKILL: on SIGTERM Paddle prints a stack trace
            self._process.join()

    def kill(self) -> None:
        """End the process without waiting for what it is doing."""
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
    """Do what comes over the pipe until it closes; the worker's side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this process
    sys.stdout.flush()
    os.dup2(2, 1)  # what a runtime prints is not part of the table
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
                answer = {"start_seconds": time.perf_counter() - started, **_description(engine)}
            elif command == "warm_up":
                for index in range(arguments[0]):
                    engine.run(batches[index % count])
            elif command == "timed_run":
                answer = _timed_run(engine, batches[arguments[0] % count])
            elif command == "memory":
                peak = peak_bytes()
                answer = {"bare_bytes": bare_bytes, "peak_bytes": peak, "engine_bytes": peak - bare_bytes}
            elif command == "run":
                answer = engine.run(arguments[0])
            if command != "run":
                _settle()
            reply = (True, answer)
        except UserError as error:
            reply = (False, str(error))
        except Exception as error:  # one engine's fault is not to end the others
            reply = (False, f"{type(error).__name__}: {error}")
        try:
            pipe.send(reply)
        except OSError:
            break
    if engine is not None:
        engine.close()


def _timed_run(engine: Any, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for _ in range(UNTIMED_RUNS):
        engine.run(batch)
    start = time.perf_counter()
    engine.run(batch)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "device_ms": getattr(engine, "last_device_ms", None), "settled": _settle()}


def _settle() -> bool:
    """Wait until this process's threads sleep, half a second at most; return whether they do."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        cpu, clock = time.process_time(), time.monotonic()
        time.sleep(_SETTLE_STEP_SECONDS)
        if time.process_time() - cpu < _IDLE_SHARE * (time.monotonic() - clock):
            return True
    return False


def _description(engine: Any) -> dict[str, Any]:
    artifact = getattr(engine, "artifact", None)
    found: dict[str, Any] = {name: getattr(engine, name) for name in ("name", "precision", "device", "threads")}
    found["versions"] = dict(engine.versions())
    found["settings"] = dict(getattr(engine, "settings", None) or {})
    found["artifact"] = str(getattr(artifact, "path", None) or artifact.directory) if artifact else None
    found["artifact_bytes"] = artifact.bytes if artifact else None
    found["artifact_hash"] = artifact.content_hash() if artifact else None
    return found


def peak_bytes() -> int:
    """Return the largest resident size that this process ever had.

    Linux hands ``ru_maxrss`` down to a process from the one that started it, and says ``VmHWM`` of this one alone.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
