"""Files that survive a kill of the process and a loss of power: written, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from act_pipeline.core.atomic_files import open_atomically


def write_durably(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file atomically, and return once the disk has it.

    Args:
        path: the file; missing folders are created.
        text: its new content.
    """
    with open_atomically(path) as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(Path(path).parent)


def append_durably(path: str | os.PathLike[str], line: str) -> None:
    """Append a line to a file, and return once the disk has it.

    A line that an earlier process left without its end is ended first, so that it cannot swallow the new one.

    Args:
        path: the file; created if it is missing.
        line: the line, without a line break.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        content = ("\n" if torn else "").encode() + line.encode("utf-8") + b"\n"
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(Path(path).parent)


def sync_files(folder: Path) -> None:
    """Flush the files in a folder, and their names, to the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
