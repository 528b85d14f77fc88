"""What a training reads, and what it has done."""

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
    """What a training did.

    Attributes:
        model: the INT8 model as saved.
        inventory: its INT8 ops.
        iterations: how many were run.
        evaluations: ``(iteration, agreement)`` of each evaluation between iterations, see
            `compress.qat.int8_snapshots.Scorer`.
        losses: ``(iteration, loss)`` of every iteration.
        stopped: why it ended early; empty if it did not.
        best: ``(iteration, agreement)`` of the best evaluation.
        earlier_seconds: what the broken runs spent on the iterations that this one did not repeat.
    """

    model: InferenceModel
    inventory: OpInventory
    iterations: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    best: Optional[tuple[int, float]] = None
    earlier_seconds: float = 0.0

    def progress(self) -> dict[str, Any]:
        """Return what an unbroken run has as well, but the model, in types that JSON has."""
        record = dataclasses.asdict(self)
        del record["model"], record["earlier_seconds"]
        record["iteration"] = record.pop("iterations")
        return record

    def take_up(self, progress: Mapping[str, Any]) -> None:
        """Set what :meth:`progress` gave.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is something else.
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
    """What a training reads from: `act_pipeline.data.loader.Loader`."""

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the last batch ended."""

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def __call__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Return the (rest of the) next epoch."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on after a batch, given the ``position`` at that time."""

    def shard(self, rank: int, world: int) -> None:
        """Give one of several processes its share; only called where there are several."""
