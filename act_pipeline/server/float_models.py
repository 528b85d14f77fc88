"""The float models of the versions and the probes of their ranges, in a process of its own with a low priority."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.server.items import Item, Outcome, Refused, Shares
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.range_probe import ProbedModel
from act_pipeline.server.settings import Limits
from act_pipeline.server.versions import prepare, prepare_probe
from act_pipeline.serving import RangeShares, Repository

_NICE = 10
# On a busy machine a process of low priority is late long before it hangs.
_PATIENCE = 4
# Number of the float model in the process; a probe has that of its version.
_FLOAT = 0
# Those of the live version and of a candidate.
_MOST_PROBES = 2


class FloatModels:
    """Loads the float model and the probe of a version when they are first needed.

    One float model and two probes at a time are in memory.
    """

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
        self._probes: dict[int, ProbedModel] = {}
        self._unprobed: dict[int, str] = {}
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
            return pool.run(_FLOAT, [item])[0]

    def ranges(self, version: int, item: Item) -> RangeShares | str:
        """Return the activations of a version's INT8 model on an image; the first call takes seconds.

        Args:
            version: the version.
            item: the image.

        Returns:
            the shares of each tensor beyond its range, or why they cannot be told here.

        Raises:
            UserError: the probe does not run on this image.
        """
        with self._lock:
            if version not in self._probes and version not in self._unprobed:
                try:
                    self._load_probe(version)
                except UserError as error:
                    self._unprobed[version] = str(error)
            if version in self._unprobed:
                return self._unprobed[version]
            model = self._probes[version]
            found: Any = self._running().run(version, [item])[0]
        if not isinstance(found, Shares):
            raise UserError(found.reason)
        return RangeShares(model.tensors, found.shares, model.runtime)

    def _load_probe(self, version: int) -> None:
        model = prepare_probe(self._repository.version(version).folder, _NICE)
        pool = self._running()
        while len(self._probes) >= _MOST_PROBES:
            oldest = next(iter(self._probes))
            del self._probes[oldest]
            pool.unload(oldest)
        pool.load(version, model)
        self._probes[version] = model

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
            model = prepare(folder, _NICE)
            pool = self._running()
            if self._loaded is not None:
                pool.unload(_FLOAT)
            pool.load(_FLOAT, model)
            self._loaded = folder
        return self._running()

    def _running(self) -> WorkerPool:
        if self._closed:
            raise UserError("the server ends")
        if self._pool is None:
            limits = replace(self._limits, seconds=_PATIENCE * self._limits.seconds)
            self._pool = WorkerPool(1, self._threads, 1, limits, _NICE)
        return self._pool
