"""Keep a thread's alternate signal stack while OpenVINO loads its CPU plugin.

On CPUs with AMX, the plugin of each ``openvino.Core`` (2026.4) gives the thread a signal stack of its own, and gives
back the one before when the Core is destroyed. If two Cores overlap and the first one is destroyed first, the thread is
left with a stack that is freed already, and the next signal, such as Ctrl-C, ends the process (SIGSEGV).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Set the thread's alternate signal stack back to what it was before the block; a destroyed Core then leaves it."""
    libc = ctypes.CDLL(None)
    before = _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
