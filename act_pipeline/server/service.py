"""Answers requests: the version that a request's id is given to, its model, and the monitor that watches both."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.server.float_models import FloatModels
from act_pipeline.server.items import Found, Item, Outcome, Prepared, Refused
from act_pipeline.server.model import ServedModel
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.settings import Limits
from act_pipeline.server.versions import LoadedVersions
from act_pipeline.serving import Monitor, RangeShares, Repository, Rules

# Without a limit, probes of 5% of the requests cost R18 at 640 a third of its images a second (2 cores).
_PROBE_TIME = 0.05


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        id: its id, which decides the version.
        items: its images.
        version: the version that the client asks for; None: as the shares say.
    """

    id: str
    items: Sequence[Item]
    version: Optional[int] = None


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        version: the version that answered.
        found: the detections on each image.
    """

    version: int
    found: Sequence[Found]


class Service:
    """What stands behind Triton and the page; several threads call it."""

    def __init__(
        self,
        repository: Repository,
        rules: Rules,
        pool: WorkerPool,
        limits: Limits,
        max_batch: int,
        floats: FloatModels,
    ) -> None:
        """Load the live version.

        Args:
            repository: the versions.
            rules: what is watched.
            pool: the processes with the models.
            limits: what is refused.
            max_batch: the most images that a worker takes at once.
            floats: the float models, for the shadow and the page.

        Raises:
            UserError: nothing is live, or the live version cannot be loaded.
        """
        self._repository, self._pool, self._limits, self._max_batch = repository, pool, limits, max_batch
        self.versions = LoadedVersions(repository, pool)
        self.floats = floats
        self.live_model = self.versions.start()
        self.monitor = Monitor(
            repository, rules, float_model=self._float, background=True, range_probe=self._ranges,
            probe_time=_PROBE_TIME,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="versions")

    def answer(self, requests: Sequence[Request]) -> list[Union[Answer, Refused]]:
        """Answer the requests of a batch.

        Args:
            requests: the requests; their images together are computed in as few batches as versions allow.

        Returns:
            for each request its answer, or why there is none.
        """
        started = time.monotonic()
        chosen = [self._choose(request) for request in requests]
        parts: dict[int, list[tuple[int, Item]]] = defaultdict(list)
        for place, (request, version) in enumerate(zip(requests, chosen)):
            if isinstance(version, int):
                parts[version] += [(place, item) for item in request.items]
        outcomes: dict[int, list[Outcome]] = defaultdict(list)
        for part, found in zip(parts.values(), self._run(parts)):
            for (place, _), outcome in zip(part, found):
                outcomes[place].append(outcome)
        seconds = time.monotonic() - started
        return [
            version if isinstance(version, Refused) else self._noted(request, version, outcomes[place], seconds)
            for place, (request, version) in enumerate(zip(requests, chosen))
        ]

    def model(self, version: int) -> Optional[ServedModel]:
        """Return the model of a loaded version; None: it is not loaded."""
        return self._pool.models.get(version)

    def ready(self) -> bool:
        """Return whether a version is loaded."""
        return any(self._pool.ready(version) for version in self._pool.models)

    def state(self) -> dict[str, Any]:
        """Return what is loaded, for the page."""
        loaded = {
            str(number): {
                "engine": model.engine,
                "precision": model.precision,
                "device": model.device,
                "input_size": list(model.input_size),
                "ready": self._pool.ready(number),
            }
            for number, model in self._pool.models.items()
        }
        return {"loaded": loaded, "workers": self._pool.pids, "worker_restarts": self._pool.restarts}

    def close(self) -> None:
        """End the processes and save the counters."""
        self.versions.close()
        self.monitor.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()
        self.floats.close()

    def _choose(self, request: Request) -> Union[int, Refused]:
        if not request.items:
            return Refused("the request has no image, expected input picture, or image")
        if request.version is not None:
            if self._pool.ready(request.version):
                return request.version
            loaded = ", ".join(str(version) for version in sorted(self._pool.models)) or "none"
            return Refused(f"version {request.version} is not loaded, expected one of: {loaded}")
        try:
            wanted = self.monitor.route(request.id)
        except UserError as error:
            return Refused(str(error), by_client=False)
        version = None if wanted is None else self.versions.answering(self._fitting(request, wanted))
        if wanted is None or version is None:
            return Refused("no version is loaded at the moment; try again", by_client=False)
        if version != wanted and self.versions.failure(wanted) is not None:
            self.monitor.failed(wanted, request.id, 0.0)
        return version

    def _fitting(self, request: Request, wanted: int) -> int:
        """Return another version for images that were prepared for another input size than that of the wanted one."""
        sizes = {item.image.shape[1:] for item in request.items if isinstance(item, Prepared)}
        models = self._pool.models
        if not sizes or wanted not in models or sizes == {models[wanted].input_size}:
            return wanted
        return next((number for number, model in models.items() if sizes == {model.input_size}), wanted)

    def _run(self, parts: dict[int, list[tuple[int, Item]]]) -> list[list[Outcome]]:
        def work(version: int, items: list[Item]) -> list[Outcome]:
            size, found = self._max_batch, []
            for start in range(0, len(items), size):
                found += self._pool.run(version, items[start : start + size])
            return found

        todo = [(version, [item for _, item in part]) for version, part in parts.items()]
        if len(todo) < 2:
            return [work(*one) for one in todo]
        return [future.result() for future in [self._threads.submit(work, *one) for one in todo]]

    def _noted(
        self, request: Request, version: int, outcomes: Sequence[Outcome], seconds: float
    ) -> Union[Answer, Refused]:
        refused = next((outcome for outcome in outcomes if isinstance(outcome, Refused)), None)
        if refused is not None:
            if not refused.by_client:
                self.monitor.failed(version, request.id, seconds)
            return refused
        found = [outcome for outcome in outcomes if isinstance(outcome, Found)]
        for place, (item, one) in enumerate(zip(request.items, found)):
            number = request.id if len(found) == 1 else f"{request.id}/{place}"
            self.monitor.answered(version, number, one.bbox, seconds, (version, item))
        return Answer(version, found)

    def _ranges(self, inputs: tuple[int, Item]) -> Union[RangeShares, str]:
        """Return the shares of activations beyond their ranges for the shadow, or why they cannot be told."""
        return self.floats.ranges(*inputs)

    def _float(self, inputs: tuple[int, Item]) -> Optional[np.ndarray]:
        """Return the float model's detections for the shadow; None: the version has no float model.

        Raises:
            UserError: it failed.
        """
        if not self.floats.has(inputs[0]):
            return None
        outcome = self.floats.run(*inputs)
        if isinstance(outcome, Refused):
            raise UserError(outcome.reason)
        return outcome.bbox
