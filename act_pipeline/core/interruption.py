"""Handling of SIGINT and SIGTERM: a running step is completed and saved, and the process ends within a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Optional

from act_pipeline.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Time limit for a step, a checkpoint and the exit. SIGTERM is often followed by SIGKILL after ten seconds.
GRACE_SECONDS = 8.0


class Interruption:
    """Raises :class:`Interrupted` for a signal: immediately or, within :meth:`held`, at the end of the block.

    Attributes:
        signum: the first signal received; None: none.
        last_words: returns the line to print if the process ends after the time limit.
    """

    def __init__(self, last_words: Callable[[], str] = lambda: "") -> None:
        self.signum: Optional[int] = None
        self.last_words = last_words
        self._held = 0

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
        first, self.signum = self.signum is None, self.signum or signum
        if first and not self._held:
            raise Interrupted(signum)


@contextlib.contextmanager
def interruptible(last_words: Callable[[], str], grace_seconds: float = GRACE_SECONDS) -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM during the block; in threads other than the main one, do nothing.

    Python handles no signal while Paddle computes, and a step of a large model can take longer than users wait. So a
    thread is notified of the signal at once (``signal.set_wakeup_fd``). It ends the process if the block has not ended
    after ``grace_seconds``; the work since the last checkpoint is lost then.

    Args:
        last_words: returns the line to print in that case. Of a block inside another one, the outer one's are printed:
            they say what the whole run leaves.
        grace_seconds: time limit for an orderly end, s.

    Yields:
        The object that delays or ignores signals.
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    interruption = Interruption(outer.last_words if isinstance(outer, Interruption) else last_words)
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while heard := os.read(reader, 1)[0]:
            if heard in _SIGNALS and not over.wait(grace_seconds):
                print(f"interrupted: {interruption.last_words()}", file=sys.stderr, flush=True)
                os._exit(128 + heard)

    watcher = threading.Thread(target=watch, name="interruption", daemon=True)
    watcher.start()
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {signum: signal.signal(signum, interruption._handle) for signum in _SIGNALS}
    try:
        yield interruption
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(woken_before)
        over.set()
        os.write(writer, b"\0")  # ends the thread
        watcher.join()
        os.close(writer)
        os.close(reader)
