"""Location of the cache, also on machines where only a temporary folder is writable."""

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
    """Return the cache folder, which may not exist yet.

    It is ``$ACT_PIPELINE_CACHE`` if set; otherwise ``act_pipeline`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; if that
    is not writable, :func:`temporary_directory`.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return next((folder for folder in _usual_places() if is_writable(folder)), None) or temporary_directory()


def readable_caches() -> list[Path]:
    """Return the folders to search for cached files: :func:`cache_directory`, then read-only caches."""
    first = cache_directory()
    return [first, *(folder for folder in _usual_places() if folder != first)]


def is_writable(folder: Path) -> bool:
    """Return whether a folder is writable, or can be created."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError:  # no permission to search a parent folder
        return False
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def temporary_directory() -> Path:
    """Return a private folder of this user in the temporary folder; create it if it is missing."""
    folder = Path(tempfile.gettempdir(), f"{_NAME}_{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{_NAME}_"))  # the name is taken by another user, or is not private


def provide_home() -> None:
    """Set ``$HOME`` if there is no home folder, and matplotlib's folder if the home folder is not writable.

    Some containers run a user without an entry in ``/etc/passwd`` and without ``$HOME``. Importing matplotlib 3.8, and
    ppdet and paddleslim, which import it, then fails.
    """
    home = _home()
    with contextlib.suppress(OSError):  # there is no temporary folder either: code that needs one raises its own error
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
