"""Checks before the work starts that a command can write where it is told to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from act_pipeline.core.errors import UserError


def require_writable_file(path: str | os.PathLike[str], flag: str, example: str) -> None:
    """Check that a file can be written, or replaced.

    Args:
        path: the file; its folders need not exist.
        flag: the command's flag that names it, for messages.
        example: a file name that would be right, for messages.

    Raises:
        UserError: it is a folder or no regular file, or nothing can be written there.
    """
    file = Path(path)
    if not str(path):
        raise UserError(f"{flag} is empty, expected a file name such as {example}")
    if file.is_dir():
        raise UserError(f"{flag}={file} is a folder, expected a file name such as {file / example}")
    if file.exists() and not file.is_file():  # a rename would put a file in the place of /dev/null, for everybody
        raise UserError(f"{flag}={file} is a device or a pipe, expected a file name such as {example}")
    require_writable_place(file, flag)


def require_writable_folder(path: str | os.PathLike[str], flag: str) -> None:
    """Check that files can be written into a folder, which is made if it is missing.

    Args:
        path: the folder.
        flag: the command's flag that names it, for messages.

    Raises:
        UserError: it is a file, or nothing can be written there.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write to; choose another {flag}")
    _require_takes_files(folder, f"{flag}={folder}")


def require_writable_place(path: str | os.PathLike[str], flag: str) -> None:
    """Check that a file or folder can be made, or replaced by a rename.

    Args:
        path: the file or folder; the folders that it is in need not exist.
        flag: the command's flag that names it, for messages.

    Raises:
        UserError: nothing can be written where it would be.
    """
    _require_takes_files(Path(path).absolute().parent, f"{flag}={path}")


def _require_takes_files(folder: Path, given: str) -> None:
    """Write a file without a name into a folder, or into the nearest one that exists: permissions alone say too little.

    ``root`` may write everywhere, but not to a read-only disk, nor to ``/proc``.
    """
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if there.is_symlink() and not there.exists():
        raise UserError(f"{given}: {there} is a link to nothing, expected a folder; choose another place")
    if not there.is_dir():
        raise UserError(f"{given}: {there} is a file, expected a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{given}: no file can be written to {there} ({error.strerror}); choose another place"
        ) from None
