"""Where work is done: many units, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol
from urllib.parse import urlsplit

from act_pipeline.core.errors import UserError

EXECUTORS = ("local", "ray")
# Units submitted to Ray, for each that it can run in parallel.
_AHEAD = 2
# Attempts for a unit that is lost with a machine or killed for memory; Ray's own retries for memory are unlimited.
_TRIES = 3
_RAY_SECONDS = 5.0


class Session(Protocol):
    """What works on units, one after the other, in one process."""

    def __call__(self, unit: Any) -> Any:
        """Return the result of a unit."""

    def close(self) -> None:
        """Free what was loaded."""


@dataclass(frozen=True)
class Work:
    """What is done with every unit, and how messages name it.

    Attributes:
        open: makes a session of ``shared``, once in each process; a module's own, so that it can be sent.
        shared: the same for all units.
        key: tells ``shared`` from others, for processes that outlive a work (Ray's).
        name: such as ``the analysis``.
        fewer: the flag that says how many processes there are.
        kept: what is left of the work when it breaks off, such as ``; what was measured is kept``; empty: nothing is.
        environment: variables that are set in the processes before they load anything; on Ray, Ray sets its own.
        cpus: that one unit takes on Ray.
        gpus: the same.
    """

    open: Callable[[Any], Session]
    shared: Any
    key: str = ""
    name: str = "the work"
    fewer: str = "--workers"
    kept: str = ""
    environment: Optional[Mapping[str, str]] = None
    cpus: int = 1
    gpus: int = 0


def run_work(
    work: Work,
    units: Sequence[Any],
    executor: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
) -> Generator[Any, None, None]:
    """Run the function on all units and yield the results in the order of completion.

    Close the iterator (``contextlib.closing``) if it may not be read to its end; this kills its processes.

    Args:
        work: the function and its resources.
        units: its second arguments, one call each.
        executor: ``local`` or ``ray``.
        workers: number of units in parallel. ``local``: number of processes; 1 or None: this process. ``ray``: number
            of submitted units; None: twice as many as the cluster runs in parallel.
        ray_address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Returns:
        An iterator over the results.

    Raises:
        UserError: Ray is not installed, does not answer or has no machine that is large enough, a worker ended, or a
            session raised it.
    """
    if executor == "ray":
        return _on_ray(work, units, workers, ray_address)
    if (workers or 1) > 1 and len(units) > 1:
        return _in_processes(work, units, min(workers or 1, len(units)))
    return _here(work, units)


def _here(work: Work, units: Sequence[Any]) -> Generator[Any, None, None]:
    with contextlib.closing(work.open(work.shared)) as session:
        for unit in units:
            yield session(unit)


class _ProcessSession:
    """The session that a process keeps from unit to unit.

    Attributes:
        work: the work of all units of this process; None if each unit comes with its own.
    """

    def __init__(self) -> None:
        self.work: Optional[Work] = None
        self._session: Optional[Session] = None
        self._key: Optional[tuple[Any, str]] = None

    def run(self, work: Work, unit: Any) -> Any:
        """Return the result of a unit, from the open session if it is of the same work, otherwise from a new one."""
        key = (work.open, work.key)
        if self._session is None or self._key != key:
            if self._session is not None:
                self._session.close()
            self._session, self._key = None, None
            self._session, self._key = work.open(work.shared), key
        return self._session(unit)


# Of a worker process: neither `concurrent.futures` nor Ray has a place for what a process keeps from unit to unit.
_PROCESS_SESSION = _ProcessSession()


def _begin(work: Work) -> None:
    _PROCESS_SESSION.work = work
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: if the parent is killed it would wait forever, as it holds both pipe ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(unit: Any) -> Any:
    assert _PROCESS_SESSION.work is not None
    return _PROCESS_SESSION.run(_PROCESS_SESSION.work, unit)


def _do_given(work: Work, unit: Any) -> Any:
    return _PROCESS_SESSION.run(work, unit)


def _in_processes(work: Work, units: Sequence[Any], workers: int) -> Generator[Any, None, None]:
    # A fork of a process that has run Paddle hangs in Paddle's thread pools.
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        # Killed processes do not remove their temporary files.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="act_pipeline_"))
        pool = ProcessPoolExecutor(workers, context, _begin, (work,))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        others = set(multiprocessing.active_children())
        try:
            with _environment({**(work.environment or {}), "TMPDIR": temporary}), _without_interrupts():
                futures = [pool.submit(_do, unit) for unit in units]
            yield from _results(futures)
        except BrokenProcessPool:
            raise UserError(
                f"a process of {work.name} ended without a word, most likely for want of memory; run it again with a "
                f"smaller {work.fewer}{work.kept}"
            ) from None
        except BaseException:
            # A running unit may take minutes, and its result is not needed.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def _results(futures: Sequence[Future[Any]]) -> Iterator[Any]:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables during the block, for processes that start in it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT for processes that start in the block: the parent ends them on Ctrl-C, without tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_ray(work: Work, units: Sequence[Any], workers: int | None, address: str | None) -> Generator[Any, None, None]:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--executor ray needs the package ray, which cannot be imported ({error}); "
            "pip install 'act_pipeline[ray]', or leave --executor out to run on this machine"
        ) from None
    if not address:
        raise UserError(
            "--executor ray needs the address of a cluster: --ray_address auto on a machine of the cluster, or "
            "--ray_address ray://HOST:10001 from elsewhere"
        )
    try:
        _require_answer(address)
        # Ray copies this package to the cluster; Paddle must be installed there.
        package = Path(__file__).resolve().parents[1]
        ray.init(address=address, runtime_env={"py_modules": [str(package)]}, log_to_driver=False)
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and its own classes
        raise UserError(
            f"no Ray cluster answers at --ray_address {address}: {_line(error)}; start one with 'ray start --head'"
        ) from None
    try:
        yield from _with_ray(ray, work, units, workers)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise an OSError if nothing listens at the address: Ray itself retries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_RAY_SECONDS).close()


def _with_ray(ray: Any, work: Work, units: Sequence[Any], workers: int | None) -> Iterator[Any]:
    room = _room(ray, work)
    at_a_time = workers or room * _AHEAD
    options: dict[str, Any] = {
        "num_cpus": work.cpus,
        "max_retries": 0,
        **({"num_gpus": work.gpus} if work.gpus else {}),
    }
    remote: Callable[..., Any] = ray.remote(**options)(_do_given).remote
    shared = ray.put(work)
    left = [(unit, 1) for unit in reversed(units)]
    waiting: dict[Any, tuple[Any, int]] = {}
    while left or waiting:
        while left and len(waiting) < at_a_time:
            unit, attempt = left.pop()
            waiting[remote(shared, unit)] = unit, attempt
        done, _ = ray.wait(list(waiting), num_returns=1)
        for reference in done:
            unit, attempt = waiting.pop(reference)
            try:
                result = ray.get(reference)
            except Exception as error:  # errors of a task are wrapped; a lost machine raises one of many classes
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise cause from None
                if cause is None and attempt < _TRIES:
                    left.append((unit, attempt + 1))
                    continue
                raise UserError(
                    f"a unit of {work.name} failed on the Ray cluster: {_line(error)}; run it again{work.kept}"
                ) from error
            yield result


def _room(ray: Any, work: Work) -> int:
    """Return how many units the cluster can run in parallel, at least 1: Ray would wait forever for resources."""
    room = 0
    for node in ray.nodes():
        has = node.get("Resources", {}) if node.get("Alive") else {}
        fit = int(has.get("CPU", 0)) // work.cpus
        room += min(fit, int(has.get("GPU", 0)) // work.gpus) if work.gpus else fit
    if not room:
        needed = f"{work.cpus} CPUs" + (f" and {work.gpus} GPU" if work.gpus else "")
        raise UserError(
            f"no machine of the Ray cluster has the {needed} that one unit of {work.name} takes; start one that has "
            "them, or ask for fewer"
        )
    return room


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
