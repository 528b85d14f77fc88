"""The versions that are loaded: those that answer, and those that may be needed at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.server.model import ServedModel, served_model
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.range_probe import ProbedModel, probed_model
from act_pipeline.server.worker import Worker, WorkerDied
from act_pipeline.serving import Repository, State

_logger = logging.getLogger(__name__)
_PERIOD_S = 0.5


def prepare(folder: Path, nice: int = 0) -> ServedModel:
    """Return what is needed to load a model, made in a process of its own: this one never loads Paddle.

    Args:
        folder: the model folder.
        nice: added to the priority number of the process.

    Raises:
        UserError: see :func:`act_pipeline.server.model.served_model`.
    """
    found: ServedModel = _in_own_process(_prepare, folder, nice)
    return found


def prepare_probe(folder: Path, nice: int = 0) -> ProbedModel:
    """Return what is needed to load the probe of a model's ranges, made in a process of its own.

    Args:
        folder: the model folder.
        nice: added to the priority number of the process.

    Raises:
        UserError: see :func:`act_pipeline.server.range_probe.probed_model`.
    """
    found: ProbedModel = _in_own_process(_prepare_probe, folder, nice)
    return found


def _in_own_process(task: Callable[..., Any], folder: Path, nice: int) -> Any:
    worker = Worker(lambda _: None, nice)
    try:
        return worker.call(task, folder, slow=True).result()
    except WorkerDied:
        raise UserError(f"{folder}: the process that prepared it ended, most likely for want of memory") from None
    except RuntimeError as error:
        raise UserError(f"{folder} cannot be prepared: {error}") from None
    finally:
        worker.close()


def _prepare(_: dict[Any, Any], folder: Path) -> ServedModel:
    return served_model(folder)


def _prepare_probe(_: dict[Any, Any], folder: Path) -> ProbedModel:
    return probed_model(folder)


def wanted_versions(state: State) -> list[int]:
    """Return the versions to have loaded, the live one first.

    Those that answer, the one that a roll back makes live, and the spare one.
    """
    found = [state.live, state.candidate, state.previous[-1] if state.previous else None, state.spare]
    return list(dict.fromkeys(version for version in found if version is not None))


class LoadedVersions:
    """Keeps the loaded versions those of a repository's pointer."""

    def __init__(self, repository: Repository, pool: WorkerPool) -> None:
        """Prepare nothing yet.

        Args:
            repository: the repository.
            pool: where the models are loaded.
        """
        self._repository, self._pool = repository, pool
        self._failed: dict[int, str] = {}
        self._order: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="versions", daemon=True)

    def start(self) -> ServedModel:
        """Load the live version, and go on with the others in a thread.

        Returns:
            the live version's model.

        Raises:
            UserError: nothing is promoted yet, or the live version is missing or cannot be loaded.
        """
        live = self._repository.state().live
        if live is None:
            raise UserError(
                f"{self._repository.folder} has no version that is live; "
                f"run deploy/promote.py --repository {self._repository.folder} --model_path MODEL first"
            )
        self._load(live)
        self._thread.start()
        return self._pool.models[live]

    def answering(self, wanted: int) -> Optional[int]:
        """Return the version that answers in the place of one that is not loaded; None: none is.

        Args:
            wanted: the version that should answer; itself, if it is loaded.
        """
        return next(
            (version for version in (wanted, *self._order, *self._pool.models) if self._pool.ready(version)), None
        )

    def failure(self, version: int) -> Optional[str]:
        """Return why a version could not be loaded; None: it could, or has not been tried."""
        return self._failed.get(version)

    def close(self) -> None:
        """End the thread; a load that is running ends with its process."""
        self._stop.set()

    def follow(self) -> None:
        """Load and unload what the pointer asks for now."""
        state = self._repository.state()
        wanted = self._order = wanted_versions(state)
        for version in set(self._failed) - set(wanted):
            del self._failed[version]  # promoted again, it is tried again
        for version in wanted:
            if version not in self._pool.models and version not in self._failed and not self._stop.is_set():
                try:
                    self._load(version)
                except UserError as error:
                    self._failed[version] = str(error)
                    _logger.warning("version %s is not served: %s", version, error)
        if any(self._pool.ready(version) for version in wanted):
            for version in set(self._pool.models) - set(wanted):
                self._pool.unload(version)

    def _load(self, version: int) -> None:
        model = prepare(self._repository.version(version).folder)
        if self._stop.is_set():
            return
        self._pool.load(version, model)
        _logger.info("version %s: %s %s on %s, %s", version, model.engine, model.precision, model.device, model.why)

    def _follow(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self.follow()
            except UserError as error:  # the pointer cannot be read at the moment
                _logger.warning("%s", error)
            except Exception:  # a bug of ours must not end the service
                _logger.exception("the versions are not followed")
