"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import making


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file that is renamed to ``path`` when the block ends without an error.

    A reader always sees the old or the new file; after an error the old one is unchanged.

    Args:
        path: the file to create or replace; missing folders are created.

    Raises:
        UserError: something is there that is no regular file, ``/dev/null`` say, or no file can be made there.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        raise UserError(f"{target} is a device or a pipe, expected a file to write to; choose another place")
    with making(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically, see :func:`open_atomically`.

    Args:
        path: the file; missing folders are created.
        content: its new content.
    """
    with open_atomically(path) as file:
        file.write(content)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 atomically, see :func:`open_atomically`.

    Args:
        path: the file; missing folders are created.
        text: its new content.
    """
    write_bytes_atomically(path, text.encode("utf-8"))
