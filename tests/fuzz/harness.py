"""What must hold for every file, whatever is in it: a result or a `UserError` of one line, soon, and nothing else done.

Nothing else done: no file written outside the target's folder, no process started, no connection made, nothing
unpickled. Python's audit hooks see these wherever they happen, in libraries too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError

# Of one example; far above what the slowest valid file takes on a busy machine.
SECONDS_AN_EXAMPLE = 45
_RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")
_CHANGES_FILES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
    "os.truncate",
)


class _Stop(BaseException):
    """What must not happen happened. No `Exception`: code that catches everything must not swallow it."""


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        name: what it is called in the tests.
        examples: makes what surrounds the file in a folder, and gives the strategy that draws its content.
        read: writes an example into that folder and reads it as the product does.
    """

    name: str
    examples: Callable[[Path], Any]
    read: Callable[[Path, Any], None]


def check(target: Target, folder: Path, example: Any) -> str:
    """Let a target read an example.

    Returns:
        ``read`` or ``refused``.

    Raises:
        AssertionError: it took too long, did what no reading does, or the error is no line.
        Exception: whatever it raised that is no `UserError`.
    """
    try:
        with _watch(folder), _limit(SECONDS_AN_EXAMPLE):
            target.read(folder, example)
    except UserError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1, f"the error is no one line: {message!r}"
        return "refused"
    except _Stop as stop:
        raise AssertionError(str(stop)) from stop
    return "read"


class _Watch:
    """The one audit hook of this process (it cannot be taken out again), and the folder that may be written to now."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.thread = 0
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wxa+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            paths = [path] if writes else []
        elif event in _CHANGES_FILES:
            paths = [argument for argument in arguments[:2] if isinstance(argument, (str, bytes, os.PathLike))]
        elif event in _RUNS_CODE:
            self._say(f"{event} {arguments!r:.200}")
            return
        else:
            return
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and not self._is_ours(os.fsdecode(path)):
                self._say(f"{event} of {path!r:.200}")

    def _is_ours(self, path: str) -> bool:
        # Where Python keeps its bytecode, and what takes everything.
        if path == os.devnull or "__pycache__" in path:
            return True
        whole = os.path.realpath(path)
        return whole == self.folder or whole.startswith(f"{self.folder}{os.sep}")

    def _say(self, what: str) -> None:
        self.seen.append(what)
        raise _Stop(what)


_hook = _Watch()
_hooked = False


@contextlib.contextmanager
def _watch(folder: Path) -> Iterator[None]:
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    before = os.getcwd()
    kept_tempdir, tempfile.tempdir = tempfile.tempdir, str(folder)
    _hook.seen.clear()
    _hook.folder = os.path.realpath(folder)
    try:
        yield
    finally:
        _hook.folder = None
        tempfile.tempdir = kept_tempdir
        os.chdir(before)
        if _hook.seen:  # raised where something caught it
            raise _Stop(_hook.seen[0])


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Stop the block when it takes longer; keep the timer of whoever runs this (pytest-timeout has one)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise _Stop(f"it took more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.001), interval)
