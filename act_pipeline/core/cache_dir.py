"""Where things are kept from run to run, also where nothing but a temporary folder can be written to."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "ACT_PIPELINE_CACHE"
_NAME = "act_pipeline"
_MATPLOTLIB_VARIABLE = "MPLCONFIGDIR"


def cache_directory() -> Path:
    """Return the folder to keep things in, which may not exist yet.

    ``$ACT_PIPELINE_CACHE`` if it is set; else ``act_pipeline`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; else, where
    that cannot be written to, a folder of the user's own in the temporary one.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return next((folder for folder in _usual_places() if is_writable(folder)), None) or temporary_directory()


def readable_caches() -> list[Path]:
    """Return where something may have been kept: :func:`cache_directory`, then caches that cannot be written to."""
    first = cache_directory()
    return [first, *(folder for folder in _usual_places() if folder != first)]


def is_writable(folder: Path) -> bool:
    """Say whether ``folder`` can be written to, or made."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError:  # no permission to look
        return False
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def temporary_directory() -> Path:
    """Return this user's folder in the temporary one, made if it is missing, closed to everyone else."""
    folder = Path(tempfile.gettempdir(), f"{_NAME}_{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{_NAME}_"))  # somebody else's lies there


def provide_home() -> None:
    """Give this process a home folder if it has none, and matplotlib a place if home cannot be written to.

    Some containers run a user without an entry in ``/etc/passwd`` and without ``$HOME``; matplotlib 3.8, and ppdet and
    paddleslim, which import it, then end with a traceback.
    """
    home = _home()
    with contextlib.suppress(OSError):  # not even a temporary folder: whoever needs one says so
        if home is None:
            os.environ["HOME"] = str(temporary_directory())
        elif not is_writable(home / ".config") and not os.environ.get("XDG_CONFIG_HOME"):
            os.environ.setdefault(_MATPLOTLIB_VARIABLE, str(cache_directory() / "matplotlib"))


def _usual_places() -> Iterator[Path]:
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / _NAME
        return
    home = _home()
    if home is not None:
        yield home / ".cache" / _NAME


def _home() -> Path | None:
    home = os.path.expanduser("~")
    return Path(home) if os.path.isabs(home) else None
