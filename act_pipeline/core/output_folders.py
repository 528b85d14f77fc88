"""Output folders that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_place

# Suffix of the output folder if the best INT8 model is not within Strategy.max_drop.
BELOW_SUFFIX = ".below_max_drop"


@contextlib.contextmanager
def making(target: str | os.PathLike[str]) -> Iterator[None]:
    """Explain why nothing can be made at a place, during a block that makes it or its folder.

    Args:
        target: the file or folder.

    Raises:
        UserError: its file system refuses new files and folders with "no such file", as ``/proc`` does.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"cannot make {target}: its file system takes no new files and folders; choose another place"
        ) from None


@contextlib.contextmanager
def new_artifact(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``directory`` when the block ends without an error.

    An existing folder is replaced as a whole; after an error it is unchanged. A link to a folder stays, and what it
    leads to is replaced. A kill between the two renames is repaired by :func:`clear_leftovers`.

    Args:
        directory: the folder to create or replace.

    Raises:
        UserError: ``directory`` is a file, or nothing can be made there.
    """
    target = _followed(directory)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, expected a folder to write to; choose another place")
    with making(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
        retired = None
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, retired / "was")
        os.replace(staging, target)
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_replaceable(directory: str | os.PathLike[str], record: str, flag: str) -> None:
    """Check that :func:`new_artifact` can write a folder, and may: it is absent, empty, or what an earlier run wrote.

    Args:
        directory: the folder.
        record: name of the record that every such folder has, ``act.json`` say.
        flag: the command's flag that names another place, for the message.

    Raises:
        UserError: it is a file, or holds something else, which would be lost, or nothing can be written there.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write to; choose another {flag}")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder} is a link to nothing, expected a folder to write to; choose another {flag}")
    require_writable_place(_followed(folder), flag)
    if not folder.is_dir() or (folder / record).is_file():
        return
    found = sorted(path.name for path in folder.iterdir())
    if found:
        raise UserError(
            f"{folder} holds {', '.join(found[:3])}{' and more' if len(found) > 3 else ''} and no {record}: it is not "
            f"what an earlier run wrote, and would be replaced as a whole; choose another {flag}"
        )


def clear_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove temporary folders that killed runs of :func:`new_artifact` left; call it when no other run is writing.

    A run killed between its two renames left the previous folder under a temporary name; it is renamed back.

    Args:
        directory: the folder that the runs were to create.
    """
    target = _followed(directory)
    # mkdtemp adds eight characters to the prefix: the pattern must not match folders of `name.other`.
    for retired in sorted(target.parent.glob(f".{glob.escape(target.name)}.old.????????")):
        if (retired / "was").is_dir() and not target.exists():
            os.replace(retired / "was", target)
        shutil.rmtree(retired, ignore_errors=True)
    for staging in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)


def _followed(directory: str | os.PathLike[str]) -> Path:
    """Return the folder that a link leads to, and another folder as it is: a rename would replace the link."""
    folder = Path(directory)
    return folder.resolve() if folder.is_symlink() else folder
