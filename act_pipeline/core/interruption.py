"""SIGINT and SIGTERM: a step that runs ends whole, what it did is kept, and the process leaves in time."""

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
# A step, a checkpoint and the way out have this long; whoever sent SIGTERM often sends SIGKILL after ten seconds.
GRACE_SECONDS = 8.0


class Interruption:
    """Turns a signal into :class:`Interrupted`, at once or, within :meth:`held`, at the end of the block.

    Attributes:
        signum: the signal that came; None: none.
    """

    def __init__(self) -> None:
        self.signum: Optional[int] = None
        self._held = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block end whole; raise :class:`Interrupted` after it if a signal came meanwhile."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signum is not None and not self._held:
            raise Interrupted(self.signum)

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Let the block end whole, and raise nothing: the way out, after a signal."""
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
    """Handle the two signals while the block runs; elsewhere than in the main thread, do nothing.

    A step of a large model on a slow machine can take longer than anybody waits, and Python sees no signal while Paddle
    computes. So a thread hears of it at once, and ends the process when ``grace_seconds`` have passed: what the last
    checkpoint holds is kept then, and no more.

    Args:
        last_words: gives the line that is printed in that case.
        grace_seconds: how long an orderly end may take.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while heard := os.read(reader, 1)[0]:
            if heard in _SIGNALS and not over.wait(grace_seconds):
                print(f"interrupted: {last_words()}", file=sys.stderr, flush=True)
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
        os.write(writer, b"\0")  # the end, for the thread
        watcher.join()
        os.close(writer)
        os.close(reader)
