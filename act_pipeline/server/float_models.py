"""The float models of the versions, in a process of its own with a low priority: for the shadow and the page."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from act_pipeline.core.errors import UserError
from act_pipeline.server.items import Item, Outcome, Refused
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.settings import Limits
from act_pipeline.server.versions import prepare
from act_pipeline.serving import Repository

_NICE = 10
# On a busy machine a process of low priority is late long before it hangs.
_PATIENCE = 4


class FloatModels:
    """Loads the float model of a version when it is first needed; one at a time is in memory."""

    def __init__(self, repository: Repository, threads: int, limits: Limits) -> None:
        """Load nothing yet.

        Args:
            repository: its versions name their float models.
            threads: number of CPU threads.
            limits: what is refused.
        """
        self._repository, self._threads, self._limits = repository, threads, limits
        self._lock = threading.Lock()
        self._pool: WorkerPool | None = None
        self._folders: dict[int, Path | None] = {}
        self._loaded: Path | None = None
        self._broken: dict[Path, str] = {}
        self._closed = False

    def has(self, version: int) -> bool:
        """Return whether a version has a float model that is still there."""
        return self._folder(version) is not None

    def run(self, version: int, item: Item) -> Outcome:
        """Detect objects in the float model of a version; the first call takes seconds.

        Args:
            version: the version.
            item: the image.
        """
        folder = self._folder(version)
        if folder is None:
            return Refused(f"version {version} has no float model here; promote it with --float_model", by_client=False)
        with self._lock:
            if folder in self._broken:
                return Refused(self._broken[folder], by_client=False)
            if self._closed:
                return Refused("the server ends", by_client=False)
            try:
                pool = self._with(folder)
            except UserError as error:
                self._broken[folder] = str(error)
                return Refused(str(error), by_client=False)
            return pool.run(0, [item])[0]

    def close(self) -> None:
        """End the process."""
        self._closed = True
        pool = self._pool
        if pool is not None:
            pool.close()

    def _folder(self, version: int) -> Path | None:
        if version not in self._folders:
            try:
                named = self._repository.version(version).float_model
            except UserError:
                named = None
            self._folders[version] = Path(named) if named is not None and Path(named).is_dir() else None
        return self._folders[version]

    def _with(self, folder: Path) -> WorkerPool:
        if self._loaded != folder:
            model = prepare(folder)
            if self._pool is None:
                limits = replace(self._limits, seconds=_PATIENCE * self._limits.seconds)
                self._pool = WorkerPool(1, self._threads, 1, limits, _NICE)
            else:
                self._pool.unload(0)
            self._pool.load(0, model)
            self._loaded = folder
        assert self._pool is not None
        return self._pool
