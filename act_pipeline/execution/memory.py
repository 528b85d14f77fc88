"""The memory that a training on the CPU takes from the system: once, and for as long as it runs.

Paddle allocates each tensor anew at each step, by glibc's ``malloc``, and the system makes what that has from it page
by page, when it is first touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

# Of glibc's malloc.h; the largest values that every version takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ALL, _LARGEST_HEAP_BLOCK = (1 << 31) - 1, 32 << 20


@contextlib.contextmanager
def freed_memory_kept(device: str) -> Iterator[None]:
    """Let glibc keep what the block frees until its end; nothing on a GPU, or with another C library.

    Else each step gives its activations back to the system and takes them again, page by page: 40,000 and more page
    faults a step of RT-DETR-R18 at 640. What the process holds at most stays as it is.

    Args:
        device: where the block computes, ``CPU`` or ``GPU``.
    """
    libc = _glibc() if device == "CPU" else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
    libc.mallopt(_M_TRIM_THRESHOLD, _ALL)
    libc.mallopt(_M_ARENA_MAX, 1)  # else what one thread has freed stays with it
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_HEAP_BLOCK)  # where glibc's own adaption ends
        libc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library of this process; None: it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None
    return libc
