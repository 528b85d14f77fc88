"""A repository: versions of a model, one pointer to those that answer, and the log of what changed it.

``versions/N/``: the models and their records; ``live.json``: the pointer; ``audit.jsonl``: the log. A change writes the
pointer, with the log's entry in it, and then appends the entry. A process that was killed between the two leaves a
pointer whose entry is missing in the log; the next change appends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import clear_leftovers, making
from act_pipeline.serving.audit import AUDIT_FILENAME, AuditLog
from act_pipeline.serving.durable_files import write_durably
from act_pipeline.serving.state import State
from act_pipeline.serving.version import VERSION_FILENAME, Version

POINTER_SCHEMA, POINTER_FILENAME = "act_pipeline.live/1", "live.json"
VERSIONS_FOLDER = "versions"
_WAIT_S = 10.0


@dataclass(frozen=True)
class Repository:
    """A repository of versions.

    Attributes:
        folder: its folder.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str], create: bool = False) -> Repository:
        """Check that a folder is a repository.

        Args:
            folder: the folder.
            create: whether an absent or empty folder becomes one.

        Raises:
            UserError: the folder is missing, a file, holds something else, or cannot be made.
        """
        found = cls(Path(folder))
        if found.folder.exists() and not found.folder.is_dir():
            raise UserError(f"{folder} is a file, expected the folder of a repository")
        is_one = any((found.folder / name).exists() for name in (POINTER_FILENAME, VERSIONS_FOLDER))
        if is_one:
            return found
        if not create:
            raise UserError(
                f"{folder} is no repository, expected a folder with {POINTER_FILENAME}; make one with "
                f"deploy/promote.py --repository {folder} --model_path MODEL"
            )
        if found.folder.is_dir() and any(found.folder.iterdir()):
            raise UserError(f"{folder} holds something else, expected a repository or an empty folder")
        with making(folder):
            (found.folder / VERSIONS_FOLDER).mkdir(parents=True, exist_ok=True)
        return found

    @property
    def pointer_path(self) -> Path:
        return self.folder / POINTER_FILENAME

    @property
    def audit(self) -> AuditLog:
        """The log; :meth:`change` and :meth:`note` append to it."""
        return AuditLog(self.folder / AUDIT_FILENAME)

    def state(self) -> State:
        """Return what the pointer says; an empty state before the first promotion.

        Raises:
            UserError: the pointer is damaged.
        """
        return self._pointer()[0]

    def folder_of(self, number: int) -> Path:
        """Return the folder of a version, which need not exist."""
        return self.folder / VERSIONS_FOLDER / str(number)

    def version(self, number: int) -> Version:
        """Return a version.

        Raises:
            UserError: it does not exist, or its record is damaged.
        """
        if not self.folder_of(number).is_dir():
            known = ", ".join(map(str, self.numbers())) or "none"
            raise UserError(f"{self.folder} has no version {number}; there are: {known}")
        return Version.read(self.folder_of(number))

    def numbers(self) -> list[int]:
        """Return the numbers of the complete versions, ascending."""
        folders = (self.folder / VERSIONS_FOLDER).glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdigit() and (path / VERSION_FILENAME).exists())

    @contextlib.contextmanager
    def changing(self) -> Iterator[State]:
        """Hold the lock for a change, and repair what a killed process left; yields the present state.

        Raises:
            UserError: another process has been changing it for ten seconds.
        """
        with self._locked():
            self._repair()
            yield self.state()

    def change(self, state: State, event: str, **figures: Any) -> dict[str, Any]:
        """Set the pointer and append the log's entry; call it in :meth:`changing`.

        Args:
            state: the new state, from a function of :mod:`act_pipeline.serving.state`.
            event: what happened: ``promote``, ``roll_back``, ``switch_to_spare`` or ``spare``.
            figures: why, values for JSON.

        Returns:
            the entry.
        """
        entry = {**_entry(event, figures), **state.as_json()}
        pointer = {"schema": POINTER_SCHEMA, **state.as_json(), "entry": entry}
        write_durably(self.pointer_path, json.dumps(pointer, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        self.audit.append(entry)
        return entry

    def note(self, event: str, **figures: Any) -> dict[str, Any]:
        """Append an entry that changes nothing, an alarm say; as :meth:`change`, in :meth:`changing`."""
        entry = _entry(event, figures)
        self.audit.append(entry)
        return entry

    def _pointer(self) -> tuple[State, Optional[dict[str, Any]]]:
        """Return the state and the log's entry of the change that made it."""
        path = self.pointer_path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State(), None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_remedy(self.folder)}") from None
        try:
            if found["schema"] != POINTER_SCHEMA:
                raise ValueError(f"schema is {found['schema']!r}, expected {POINTER_SCHEMA!r}")
            return State.from_json(found), found.get("entry")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {_remedy(self.folder)}") from None

    def _repair(self) -> None:
        state, entry = self._pointer()
        if isinstance(entry, dict) and self.audit.last_change() < state.change:
            self.audit.append(entry)
        for path in self.folder.glob(f".{POINTER_FILENAME}.*"):
            path.unlink(missing_ok=True)
        for path in (self.folder / VERSIONS_FOLDER).glob(".*.????????"):
            clear_leftovers(path.parent / path.name[1:].split(".")[0])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            _retry(lambda: stack.enter_context(hold_lock(self.folder)), self.folder)
            yield


class PointerWatch:
    """The state of a repository, read again when another process has changed it."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._seen: Optional[tuple[int, int, int]] = None
        self._state = State()

    def state(self) -> State:
        """Return the present state; costs a ``stat`` where nothing has changed.

        Raises:
            UserError: the pointer is damaged, and none could be read before.
        """
        try:
            found = os.stat(self._repository.pointer_path)
        except FileNotFoundError:
            return self._state
        mark = found.st_ino, found.st_mtime_ns, found.st_size
        if mark != self._seen:
            try:
                self._state = self._repository.state()
            except UserError:
                if self._seen is None:
                    raise
                return self._state  # the service goes on with the last state that could be read
            self._seen = mark
        return self._state


def _retry(attempt: Callable[[], Any], folder: Path) -> None:
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            attempt()
            return
        except UserError:
            if time.monotonic() > end:
                raise UserError(
                    f"{folder}: another process has been changing it for {_WAIT_S:.0f} seconds; try again"
                ) from None
            time.sleep(0.02)


def _entry(event: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "event": event, **figures}


def _remedy(folder: Path) -> str:
    return f"write it again from the last line of {folder / AUDIT_FILENAME}"
