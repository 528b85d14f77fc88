"""Handling of SIGINT and SIGTERM: a running step is completed and saved, and the process ends within a time limit.

Every command is run by :func:`ended_by_signals`; the training nests :func:`interruptible`, which saves a checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

from act_pipeline.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Time limit for a step, a checkpoint and the exit. SIGTERM is often followed by SIGKILL after ten seconds.
GRACE_SECONDS = 8.0
_LATER_SECONDS = 0.05
_Main = Callable[[Optional[Sequence[str]]], int]


class _AfterPaddle(importlib.abc.MetaPathFinder):
    """Sets Python's handlers again while Paddle is being imported.

    The import of paddlepaddle 2.6.2 puts a handler in C++ in their place, without Python's knowledge: it prints a
    traceback on SIGTERM and ends the process. Modules of Paddle are imported after that too, and each asks this finder,
    which finds none.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("paddle.") and threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                handler = signal.getsignal(signum)
                if callable(handler):
                    signal.signal(signum, handler)


class Interruption:
    """Raises :class:`Interrupted` for a signal: immediately or, within :meth:`held`, at the end of the block.

    Attributes:
        signum: the first signal received; None: none.
        last_words: returns the line to print if the process ends after the time limit.
        general: whether that line says nothing of what the run leaves, so that a block inside has a better one.
    """

    def __init__(self, last_words: Callable[[], str] = lambda: "", general: bool = False) -> None:
        self.signum: Optional[int] = None
        self.last_words, self.general = last_words, general
        self._held = 0
        self._late = False
        self._over = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the end of the block.

        Raises:
            Interrupted: at the end of the outermost block, if a signal was received.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signum is not None and not self._held:
            raise Interrupted(self.signum)

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignore signals during the block, for cleaning up after a signal."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _handle(self, signum: int, frame: Any) -> None:
        due, self._late = self.signum is None or self._late, False
        self.signum = self.signum or signum
        if due and not self._held:
            if _loads_paddle():
                self._raise_later()
            else:
                raise Interrupted(signum)

    def _raise_later(self) -> None:
        """Let the handler raise in a moment, when Paddle's library has been loaded."""
        self._late = True
        signum = self.signum

        def send() -> None:
            while not self._over.wait(_LATER_SECONDS):
                if signum is not None and not _loads_paddle():
                    os.kill(os.getpid(), signum)
                    return

        threading.Thread(target=send, daemon=True).start()


def _loads_paddle() -> bool:
    """Return whether Paddle loads its library: 2.6.2 prints about any exception that comes meanwhile."""
    return getattr(getattr(sys.modules.get("paddle.base.core"), "__spec__", None), "_initializing", False)


@contextlib.contextmanager
def interruptible(
    last_words: Callable[[], str], grace_seconds: float = GRACE_SECONDS, *, general: bool = False
) -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM during the block; in threads other than the main one, do nothing.

    Python handles no signal while Paddle computes, and a step of a large model can take longer than users wait. So a
    thread is notified of the signal at once (``signal.set_wakeup_fd``). It ends the process if the block has not ended
    after ``grace_seconds``; the work since the last checkpoint is lost then. Code in the block that sets a handler of
    its own answers for the time that it takes.

    Args:
        last_words: returns the line to print in that case. Of a block inside another one, the outer one's are printed,
            which say what the whole run leaves, unless they are general.
        grace_seconds: time limit for an orderly end, s.
        general: see :class:`Interruption`.

    Yields:
        The object that delays or ignores signals.
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Interruption) and not outer.general:
        last_words = outer.last_words
    interruption = Interruption(last_words, general)
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = interruption._over

    def watch() -> None:
        while heard := os.read(reader, 1)[0]:
            if heard not in _SIGNALS or signal.getsignal(heard) != interruption._handle:
                continue
            if not over.wait(grace_seconds):
                line = "\n" if sys.stderr.isatty() else ""  # ends the line of a progress bar
                print(f"{line}interrupted: {interruption.last_words()}", file=sys.stderr, flush=True)
                os._exit(128 + heard)

    watcher = threading.Thread(target=watch, name="interruption", daemon=True)
    watcher.start()
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {signum: signal.signal(signum, interruption._handle) for signum in _SIGNALS}
    unraisable, after_paddle = sys.unraisablehook, _AfterPaddle()

    def dropped(caught: Any) -> None:
        if isinstance(caught.exc_value, Interrupted):  # raised in a callback or __del__, which pass no exception on
            interruption._raise_later()
        else:
            unraisable(caught)

    sys.unraisablehook = dropped
    sys.meta_path.insert(0, after_paddle)
    try:
        yield interruption
    finally:
        sys.meta_path.remove(after_paddle)
        sys.unraisablehook = unraisable
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(woken_before)
        over.set()
        os.write(writer, b"\0")  # ends the thread
        watcher.join()
        os.close(writer)
        os.close(reader)


def ended_by_signals(main: _Main) -> _Main:
    """Return a command's ``main`` that SIGINT and SIGTERM end with :class:`Interrupted`.

    Args:
        main: takes the argument list and returns an exit code.
    """

    def interruptible_main(argv: Optional[Sequence[str]] = None) -> int:
        words = "a step took too long to end; hidden temporary folders may be left"
        with interruptible(lambda: words, general=True) as interruption:
            try:
                return main(argv)
            except Exception:
                # Modules in C turn an exception that comes while they are imported into an error of their own.
                if interruption.signum is None:
                    raise
                raise Interrupted(interruption.signum) from None

    return interruptible_main
