"""A process that has models loaded, seen from both sides: it reads pictures of strangers, and may be killed."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.core.worker_processes import end_with_parent, without_interrupts

# While one batch is computed, the pictures of the next are decoded.
BATCHES_AT_ONCE = 2


class WorkerDied(Exception):
    """The process ended before it answered."""


@dataclass(frozen=True)
class Call:
    """A message to the process.

    Attributes:
        number: of the call, for the answer.
        task: the function; it gets the process's models, a dictionary of its own, before the arguments.
        arguments: of the function.
        slow: whether it may take seconds; such calls run one after the other, next to the others.
    """

    number: int
    task: Callable[..., Any]
    arguments: tuple[Any, ...]
    slow: bool


class Worker:
    """A process; calls may come from several threads.

    Attributes:
        held: numbers of the models that it has loaded; the pool keeps them.
        busy: number of batches that it computes; the pool keeps it.
    """

    def __init__(self, died: Callable[[Worker], None], nice: int = 0) -> None:
        """Start the process.

        Args:
            died: called once, in a thread, when the process has ended without :meth:`close`.
            nice: added to the priority number of the process.
        """
        self.held: set[int] = set()
        self.busy = 0
        self._died, self._closing = died, False
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock, self._send_lock = threading.Lock(), threading.Lock()
        self._ended = False
        # A fork of a process with threads, or that has run Paddle, may hang.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with without_interrupts():
            self._process = context.Process(target=_serve, args=(theirs, nice), daemon=True)
            self._process.start()
        theirs.close()
        threading.Thread(target=self._receive, name="answers", daemon=True).start()

    @property
    def pid(self) -> Optional[int]:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether calls can be made."""
        return not self._ended

    def call(self, task: Callable[..., Any], *arguments: Any, slow: bool = False) -> Future[Any]:
        """Run a module's function in the process.

        Args:
            task: gets the dictionary of the process before the arguments.
            arguments: of the function.
            slow: see :class:`Call`.

        Returns:
            its result, its exception, or :class:`WorkerDied`.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._ended:
                future.set_exception(WorkerDied())
                return future
            self._waiting[number] = future
        try:
            with self._send_lock:
                self._connection.send(Call(number, task, arguments, slow))
        except (OSError, ValueError):  # the reading thread sees the end too, and answers
            pass
        return future

    def kill(self) -> None:
        """End the process at once; its calls get :class:`WorkerDied`."""
        self._process.kill()

    def close(self, seconds: float = 5.0) -> None:
        """End the process; a second call does nothing."""
        self._closing = True
        with contextlib.suppress(OSError, ValueError), self._send_lock:
            self._connection.send(None)
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> None:
        while True:
            try:
                number, result, error = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._waiting.pop(number, None)
            if future is not None:
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        with self._lock:
            self._ended = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(WorkerDied())
        if not self._closing:
            self._process.kill()  # it may have closed its end only
            self._process.join()
            self._died(self)


def _serve(calls: Connection, nice: int) -> None:
    """Run calls until the connection is closed; this is the main function of the process."""
    # The server's own process decides when its workers end: a signal to the group must not cut off a batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    if nice:
        os.nice(nice)
    held: dict[Any, Any] = {}
    lock = threading.Lock()
    quick = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="batch")
    slow = ThreadPoolExecutor(1, thread_name_prefix="load")

    def work(call: Call) -> None:
        result: Any = None
        error: Optional[Exception] = None
        try:
            result = call.task(held, *call.arguments)
        except UserError as found:
            error = UserError(str(found))
        except Exception as found:  # a bug of ours must not end the process
            traceback.print_exc()
            error = RuntimeError(f"{type(found).__name__}: {found}")
        with lock:
            calls.send((call.number, result, error))

    while True:
        try:
            call = calls.recv()
        except (EOFError, OSError):
            call = None
        if call is None:
            os._exit(0)
        (slow if call.slow else quick).submit(work, call)
