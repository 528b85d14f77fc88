"""The memory that a training on the CPU takes from the system: once, before it is needed, and for as long as it runs.

Paddle allocates each tensor anew at each step, by glibc's ``malloc``. What that has from the system is made page by
page when it is first touched, and where a virtual machine's host does the same (Firecracker), each GiB costs 3 seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Of glibc's malloc.h; the largest values that every version takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ALL, _LARGEST_HEAP_BLOCK = (1 << 31) - 1, 32 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_BLOCK = _LARGEST_HEAP_BLOCK // 2
# Whoever needs another mapping meanwhile waits for one piece.
_PIECE = 4 << 20


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


class TakenAhead:
    """Memory that a thread takes from the system while Python computes on one core, for ``malloc`` to give out later.

    It is held until then: the C code of protobuf gives all that is free back to the system now and then. Make it within
    :func:`freed_memory_kept`, which keeps it when it is free.
    """

    def __init__(self, size: int) -> None:
        """Begin; a Linux before 5.14, and another C library, take nothing.

        Args:
            size: bytes; no more than half of what the system has free is taken.
        """
        self._libc, self._closed = _glibc(), threading.Event()
        self._blocks: list[int] = []
        if self._libc is not None:
            free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
            count = min(size, free // 2) // _BLOCK
            self._blocks = [block for block in (self._libc.malloc(_BLOCK) for _ in range(count)) if block]
        self.thread = threading.Thread(target=self._populate, name="heap", daemon=True)
        self.thread.start()

    def _populate(self) -> None:
        """Have the pages of the blocks made."""
        for block in self._blocks:
            begin, end = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE, (block + _BLOCK) // mmap.PAGESIZE * mmap.PAGESIZE
            for at in range(begin, end, _PIECE):
                if self._closed.is_set() or self._libc.madvise(at, min(_PIECE, end - at), _MADV_POPULATE_WRITE) != 0:
                    return

    def close(self) -> None:
        """Take no more, and let ``malloc`` give out what there is."""
        self._closed.set()
        self.thread.join()
        while self._blocks:
            self._libc.free(self._blocks.pop())


def _glibc() -> Any:
    """Return the C library of this process; None: it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
