"""Work on units in several processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pickle import PicklingError
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.work import Work


def run_in_processes(work: Work, units: Sequence[Any], workers: int) -> Generator[Any, None, None]:
    """Work on units in several processes, and yield the results in the order of completion.

    Args:
        work: the work.
        units: its units.
        workers: the number of processes.

    Raises:
        UserError: a process ended, or a session raised it.
    """
    # A fork of a process that has run Paddle hangs in Paddle's thread pools.
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        # Killed processes do not remove their temporary files.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="act_pipeline_"))
        with _environment({**(work.environment or {}), "TMPDIR": temporary}), without_interrupts():
            started = [stack.enter_context(_worker(context, work)) for _ in range(workers)]
        try:
            yield from _results(started, units)
        except _Ended:
            raise UserError(
                f"a process of {work.name} ended without a word, most likely for want of memory; run it again with a "
                f"smaller {work.fewer}{work.kept}"
            ) from None


class _Ended(Exception):
    """A process ended before it sent the result of its unit."""


@contextlib.contextmanager
def _worker(context: SpawnContext, work: Work) -> Iterator[Connection]:
    """Start a process, which ends with the ``with`` block; if an exception leaves the block, it is killed."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    except BaseException:
        # A running unit may take minutes, and its result is not needed.
        process.kill()
        raise
    finally:
        ours.close()
        process.join()


def _results(workers: Sequence[Connection], units: Sequence[Any]) -> Iterator[Any]:
    """Send the units to the workers, one at a time to each, and yield the results."""
    left, busy = iter(units), []
    for worker, unit in zip(workers, left):
        _send(worker, unit)
        busy.append(worker)
    while busy:
        for worker in _ready(busy):
            busy.remove(worker)
            try:
                result, error, where = worker.recv()
            except (EOFError, ConnectionError):
                raise _Ended from None
            if error is not None:
                raise error from RuntimeError(f"in a process:\n{where}")
            for unit in islice(left, 1):
                _send(worker, unit)
                busy.append(worker)
            yield result


def _send(worker: Connection, unit: Any) -> None:
    try:
        worker.send(unit)
    except ConnectionError:
        raise _Ended from None


def _ready(workers: Sequence[Connection]) -> list[Connection]:
    return [worker for worker in wait(workers) if isinstance(worker, Connection)]


def _serve(work: Work, units: Connection) -> None:
    """Work on the units that a connection receives, until it is closed; this is the main function of a process."""
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        session = None
        while True:
            unit = units.recv()
            try:
                if session is None:
                    session = stack.enter_context(contextlib.closing(work.open(work.shared)))
                answer: tuple[Any, Exception | None, str] = (session(unit), None, "")
            except Exception as error:
                answer = (None, error, traceback.format_exc())
            try:
                units.send(answer)
            except (PicklingError, TypeError, AttributeError) as error:
                units.send((None, RuntimeError(f"the result cannot be sent: {error}"), traceback.format_exc()))


def end_with_parent() -> None:
    """End this process with its parent, also in the middle of a unit; runs in a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
def without_interrupts() -> Iterator[None]:
    """Block SIGINT for processes that start in the block: the parent ends them on Ctrl-C, without tracebacks."""
    # The first process that starts also starts this one, which ends by unblocking SIGINT (Python 3.9 to 3.12).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
