"""The result of a training, and the interface of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import numpy as np

from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.core.artifacts import InferenceModel


@dataclass
class Training:
    """The progress and result of a training.

    Attributes:
        model: the saved INT8 model.
        inventory: the INT8 ops of the last model that was written.
        iterations: the number of iterations so far.
        evaluations: ``(iteration, agreement)`` of each evaluation, see `compress.qat.int8_snapshots.Scorer`.
        losses: ``(iteration, loss)`` of every iteration.
        stopped: why the training ended early; empty if it did not.
        best: ``(iteration, agreement)`` of the best evaluation; None: no evaluation.
        lowest: activation that is rounded with a zero point -> its least value, see `compress.qat.zero_points`.
        earlier_seconds: time that interrupted runs spent on the iterations that this run did not repeat.
    """

    model: InferenceModel
    inventory: OpInventory
    iterations: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    best: Optional[tuple[int, float]] = None
    lowest: dict[str, float] = field(default_factory=dict)
    earlier_seconds: float = 0.0

    def progress(self) -> dict[str, Any]:
        """Return the entries for a checkpoint in JSON types: all attributes but ``model`` and ``earlier_seconds``."""
        record = dataclasses.asdict(self)
        del record["model"], record["earlier_seconds"]
        record["iteration"] = record.pop("iterations")
        return record

    def take_up(self, progress: Mapping[str, Any]) -> None:
        """Restore the attributes from a checkpoint.

        Args:
            progress: the output of :meth:`progress`, and ``seconds``, the time of the interrupted runs.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: ``progress`` has another form.
        """
        self.iterations = int(progress["iteration"])
        self.evaluations = [_pair(evaluation) for evaluation in progress["evaluations"]]
        self.losses = [_pair(loss) for loss in progress["losses"]]
        self.stopped = str(progress["stopped"])
        self.best = _pair(progress["best"]) if progress["best"] is not None else None
        self.earlier_seconds = float(progress["seconds"])
        self.inventory = OpInventory(**progress["inventory"])


def _pair(value: Any) -> tuple[int, float]:
    iteration, figure = value
    return int(iteration), float(figure)


class Batches(Protocol):
    """Interface of the training data; implemented by `act_pipeline.data.loader.Loader`.

    Attributes:
        position: position in the data after the last batch, in JSON types.
    """

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the last batch ended."""

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def __call__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Return the batches of the next epoch, or after :meth:`seek` the remaining ones of an epoch."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``position`` was read."""

    def shard(self, rank: int, world: int) -> None:
        """Restrict the batches to the share of one of ``world`` processes; called only if there are several."""
