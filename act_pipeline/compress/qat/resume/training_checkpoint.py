"""Save the state of a training that runs in Paddle to a checkpoint, and restore it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.qat import state
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints, Snapshot
from act_pipeline.compress.qat.training import Batches, Training
from act_pipeline.execution.finite_checks import LOWER_RATE, Diverged

_SEED = 0


class TrainingCheckpoint:
    """Restore the state of an interrupted training, and save the state of the running one.

    Attributes:
        checkpoints: the checkpoint on disk; None: nothing is restored or saved.
    """

    def __init__(
        self,
        checkpoints: Optional[Checkpoints],
        training: Training,
        batches: Batches,
        infos: tuple[Any, Any],
        *,
        place: Any,
        best_dir: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        """Seed all random generators, and restore the state of the checkpoint if a run is resumed.

        Args:
            checkpoints: the checkpoint on disk; None: nothing is restored or saved.
            training: the progress; set to that of the interrupted run.
            batches: the training data; set to the batch after the last one of the interrupted run.
            infos: PaddleSlim's ``ProgramInfo`` of the training and of the test program; their variables are
                initialized, and no step was run.
            place: the device of the variables.
            best_dir: folder of the best INT8 model, existing or not.
            ranks: the processes that train together; all start from the state of rank 0.

        Raises:
            UserError: the checkpoint is damaged or belongs to another program.
        """
        self.checkpoints = checkpoints
        self._training, self._batches, self._best_dir = training, batches, best_dir
        self._learning_rate, self._ranks = infos[0].learning_rate, ranks
        self._names = state.changing_variables(infos)
        self._position: Mapping[str, int] = {}
        values = state.read_variables(self._names)
        # RT-DETR's masked anchors are infinite, and so are the ranges observed on tensors computed from them.
        observed = state.observed_only(infos)
        self._never_finite = {name for name in values if state.first_not_finite({name: values[name]})}
        self._never_finite |= {key for key, name in self._names.items() if name in observed}
        self._started = time.perf_counter()
        state.seed_all(_SEED)
        if checkpoints is not None and checkpoints.resumed is not None:
            self._take_up(checkpoints.resumed, checkpoints.damaged, place)
        shared = ranks.share(lambda: self._snapshot(state.read_variables(self._names)))
        if shared is not None:
            self._take_up(shared, lambda error: error, place)

    def _take_up(self, snapshot: Snapshot, damaged: Callable[[Exception], Exception], place: Any) -> None:
        progress = snapshot.progress
        try:
            self._training.take_up(progress)
            state.write_random_states(progress["random"])
            if progress["scheduler"] is not None:
                self._learning_rate.set_state_dict(dict(progress["scheduler"]))
            self._position = progress["position"]
            if self._position:  # empty on a follower before the first step
                for position in self._ranks.positions(self._position):
                    self._batches.seek(position)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            raise damaged(error) from None  # Paddle raises RuntimeError for a schedule whose state lacks a key
        state.write_variables(snapshot.variables, self._names, place)
        if snapshot.best_model is not None:
            shutil.copytree(snapshot.best_model, self._best_dir)

    def note_step(self, position: Mapping[str, int]) -> None:
        """Store the position in the training data after the batch of the last step."""
        self._position = dict(position)

    def save(self) -> None:
        """Write a checkpoint unless no step has been run; if it fails, the last checkpoint remains.

        Raises:
            Diverged: a weight, a scale or a moving average is not finite.
            OSError: the checkpoint cannot be written.
        """
        if self.checkpoints is None or not self._training.iterations:
            return
        variables = state.read_variables(self._names)
        bad = state.first_not_finite(variables, self._never_finite)
        if bad:
            raise Diverged(f"{bad} is not finite after iteration {self._training.iterations}; {LOWER_RATE}")
        self.checkpoints.save(self._snapshot(variables))

    def _snapshot(self, variables: Mapping[str, np.ndarray]) -> Snapshot:
        fixed_rate = isinstance(self._learning_rate, float)
        progress = {
            **self._training.progress(),
            "seconds": self._training.earlier_seconds + time.perf_counter() - self._started,
            "position": self._position,
            "random": state.read_random_states(),
            "scheduler": None if fixed_rate else state.plain(self._learning_rate.state_dict()),
        }
        return Snapshot(progress, dict(variables), self._best_dir if self._training.best else None)
