"""A lock that allows one run at a time to write to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import making

# File systems without flock (some network mounts): the run continues without a lock.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def hold_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder during the block.

    The lock is a ``flock`` on a file next to the folder, which the kernel releases when the process ends.

    Args:
        directory: the folder; it need not exist.

    Raises:
        UserError: another process holds the lock, or nothing can be made there.
    """
    target = Path(directory).absolute()
    path = target.parent / f".{target.name}.lock"
    with making(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, target)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # Removed before the lock is released: a process that opened it before finds in _acquire that it was removed.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, target: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "of unknown number"
            os.close(handle)
            raise UserError(
                f"{target}: process {pid} is writing there; wait for it, end it, or choose another --save_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            return handle
        # The previous holder may have removed the file between the open and the lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
