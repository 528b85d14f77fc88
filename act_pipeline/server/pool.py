"""Workers with the same models: a batch goes to a free one, and to another one if that is killed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Optional, Protocol

from act_pipeline.core.errors import UserError
from act_pipeline.server.items import Item, Outcome, Refused
from act_pipeline.server.settings import Limits
from act_pipeline.server.worker import BATCHES_AT_ONCE, Worker, WorkerDied

_logger = logging.getLogger(__name__)
_ATTEMPTS = 3
_LOAD_SECONDS = 600.0


class Loadable(Protocol):
    """What a worker loads: a :class:`act_pipeline.server.model.ServedModel`, or a probe of one."""

    @property
    def artifact(self) -> Any:
        """The file, for messages."""

    def load(self, threads: int, max_batch: int, limits: Limits) -> Any:
        """Return it loaded in this process, with ``warm``, ``run`` and ``close``."""


class WorkerPool:
    """Processes that have the same models loaded; its threads share it."""

    def __init__(self, workers: int, threads: int, max_batch: int, limits: Limits, nice: int = 0) -> None:
        """Start the processes, without a model.

        Args:
            workers: number of processes.
            threads: CPU threads of each.
            max_batch: the largest batch.
            limits: what is refused; a batch that takes longer than ``seconds`` ends its worker.
            nice: added to the priority number of the processes.
        """
        self._arguments = threads, max_batch, limits
        self._seconds, self._nice = limits.seconds, nice
        # How long a batch waits for a process: one that was killed is back within it.
        self._patience = max(2 * limits.seconds, 20.0)
        self._models: dict[int, Any] = {}
        self._free = threading.Condition()
        self._loading = threading.RLock()
        self._closed = False
        self.restarts = 0
        self._workers: list[Worker] = []
        with self._free:
            self._workers += [Worker(self._replace, nice) for _ in range(workers)]

    @property
    def models(self) -> dict[int, Any]:
        """Number -> model, of those that every worker has or will have."""
        return dict(self._models)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        with self._free:
            return [worker.pid for worker in self._workers if worker.alive and worker.pid]

    def ready(self, number: int) -> bool:
        """Return whether a worker has a model."""
        with self._free:
            return any(worker.alive and number in worker.held for worker in self._workers)

    def load(self, number: int, model: Loadable) -> None:
        """Load a model in each worker, one after the other; the others answer meanwhile.

        Args:
            number: how :meth:`run` names it.
            model: the model, or the probe of one.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._loading:
            self._models[number] = model
            try:
                for worker in list(self._workers):
                    self._load(worker, number, model)
            except UserError:
                self.unload(number)
                raise

    def unload(self, number: int) -> None:
        """Free a model; its running batches end first."""
        with self._loading:
            self._models.pop(number, None)
            for worker in list(self._workers):
                with self._free:
                    worker.held.discard(number)
                worker.call(_unload, number, slow=True)

    def run(self, number: int, items: Sequence[Item]) -> list[Outcome]:
        """Detect objects on images.

        If the worker ends meanwhile, the batch is computed again: image by image, so that one that ends workers does
        not end the others' requests.

        Args:
            number: the model's.
            items: the images, at most the largest batch.
        """
        end = time.monotonic() + self._patience
        outcome = self._attempt(number, items, end)
        if outcome is not None:
            return outcome
        return [self._alone(number, item, end) for item in items]

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        with self._free:
            self._closed = True
            self._free.notify_all()
        for worker in self._workers:
            worker.close()

    def _alone(self, number: int, item: Item, end: float) -> Outcome:
        for _ in range(_ATTEMPTS - 1):
            outcome = self._attempt(number, [item], end)
            if outcome is not None:
                return outcome[0]
        return Refused("the process that computed this image ended each time", by_client=False)

    def _attempt(self, number: int, items: Sequence[Item], end: float) -> Optional[list[Outcome]]:
        """Return the outcomes; None: the worker ended."""
        worker = self._take(number, end)
        if worker is None:
            return [Refused("no process was free in time; try again", by_client=False)] * len(items)
        try:
            found: list[Outcome] = worker.call(_run, number, list(items)).result(self._seconds)
            return found
        except WorkerDied:
            return None
        except FutureTimeout:
            _logger.warning("a batch took more than %g seconds: its process is ended", self._seconds)
            worker.kill()
            return None
        except (UserError, RuntimeError) as error:
            return [Refused(str(error), by_client=False)] * len(items)
        finally:
            with self._free:
                worker.busy -= 1
                self._free.notify_all()

    def _take(self, number: int, end: float) -> Optional[Worker]:
        with self._free:
            while not self._closed:
                able = [
                    worker for worker in self._workers
                    if worker.alive and number in worker.held and worker.busy < BATCHES_AT_ONCE
                ]  # fmt: skip
                if able:
                    worker = min(able, key=lambda found: found.busy)
                    worker.busy += 1
                    return worker
                if not self._free.wait(end - time.monotonic()):
                    return None
        return None

    def _load(self, worker: Worker, number: int, model: Loadable) -> None:
        try:
            worker.call(_load, number, model, *self._arguments, slow=True).result(_LOAD_SECONDS)
        except WorkerDied:
            return  # the one that replaces it loads it
        except FutureTimeout:
            raise UserError(f"{model.artifact} was not loaded within {_LOAD_SECONDS:g} seconds") from None
        except RuntimeError as error:
            raise UserError(f"{model.artifact} cannot be loaded: {error}") from None
        with self._free:
            worker.held.add(number)
            self._free.notify_all()
        worker.call(_warm, number, slow=True)

    def _replace(self, worker: Worker) -> None:
        """Start another process in the place of one that has ended, and load the models; called in a thread."""
        with self._free:
            if self._closed or worker not in self._workers:
                return
            self.restarts += 1
            _logger.warning("process %s of the model has ended; it is started again", worker.pid)
            started = Worker(self._replace, self._nice)
            self._workers[self._workers.index(worker)] = started
        with self._loading:
            for number, model in list(self._models.items()):
                try:
                    self._load(started, number, model)
                except UserError as error:
                    _logger.warning("the new process does not load version %s: %s", number, error)
        with self._free:
            closed = self._closed
        if closed:
            started.close()


def _load(held: dict[Any, Any], number: int, model: Loadable, threads: int, max_batch: int, limits: Limits) -> None:
    import cv2

    cv2.setNumThreads(1)
    if number not in held:
        held[number] = model.load(threads, max_batch, limits)


def _warm(held: dict[Any, Any], number: int) -> None:
    try:
        held[number].warm()
    except UserError as error:
        _logger.warning("version %s computes image by image: %s", number, error)


def _unload(held: dict[Any, Any], number: int) -> None:
    model = held.pop(number, None)
    if model is not None:
        model.close()


def _run(held: dict[Any, Any], number: int, items: list[Item]) -> list[Outcome]:
    model = held.get(number)
    if model is None:
        return [Refused(f"version {number} is not loaded any more", by_client=False)] * len(items)
    outcomes: list[Outcome] = model.run(items)
    return outcomes
