"""The training loop: steps, evaluations, checkpoints, early stopping and interruption."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Optional

import numpy as np

from act_pipeline.compress.accuracy_control.revert import read_ranges, read_thresholds
from act_pipeline.compress.paddleslim.qdq_program import set_lowest
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.qat import state
from act_pipeline.compress.qat.divergence import is_due, why_stop
from act_pipeline.compress.qat.int8_snapshots import Int8Snapshots
from act_pipeline.compress.qat.programs import Programs, Schedule
from act_pipeline.compress.qat.resume.training_checkpoint import TrainingCheckpoint
from act_pipeline.compress.qat.setup import Setup
from act_pipeline.compress.qat.training import Training
from act_pipeline.compress.qat.unfolded_weights import weight_ends
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.core.progress import Progress
from act_pipeline.execution import cpu_cores
from act_pipeline.execution.finite_checks import LOWER_RATE, Diverged
from act_pipeline.execution.not_finite import Origin
from act_pipeline.execution.prefetcher import Prefetcher
from act_pipeline.graph.static_graph import existing_objects_frozen

# ACT stops when the relative difference from the float model's metric (TrainConfig.origin_metric) is at most this.
_NEAR_ORIGIN = 0.005
_Feed = Mapping[str, np.ndarray]


class TrainingLoop:
    """Run a training whose programs are built.

    Attributes:
        setup: the data, settings and callbacks of the training.
        training: the progress and result of the training.
        best_dir: folder of the best INT8 model, from which ``AutoCompression`` copies it to ``save_dir``.
    """

    def __init__(
        self, setup: Setup, schedule: Schedule, programs: Programs, feeds: Callable[[], Iterator[_Feed]], work: Path
    ) -> None:
        """Set the initial scales and biases, and resume from the checkpoint if there is one.

        Args:
            setup: the data, settings and callbacks of the training.
            schedule: when the training ends, and when it is evaluated.
            programs: the programs of the training.
            feeds: yields the (remaining) batches of an epoch, by the names of the model's inputs.
            work: a temporary folder of this run.

        Raises:
            UserError: the checkpoint is damaged or belongs to another program.
        """
        self.setup, self._schedule, self._programs, self._feeds = setup, schedule, programs, feeds
        self._work, self.best_dir = work, work / "strategy_1"
        self.training = Training(InferenceModel(self.best_dir), OpInventory({}, []), lowest=dict(setup.lowest))
        set_lowest(state.program_of(programs.test), setup.lowest)
        self._snapshots = Int8Snapshots(setup.scorer, setup.one_image, setup.op_types, programs.op_order, setup.factors)
        # Several processes exchange gradients within a step, which none of them can repeat alone. On a GPU, copying
        # the weights costs a good part of a step.
        repeatable = setup.ranks.world == 1 and cpu_cores.on_cpu()
        self._origin = Origin(state.program_of(programs.train), programs.place) if repeatable else None
        if setup.start is not None:
            ends = weight_ends(state.program_of(programs.train), setup.factors)
            thresholds = {**read_ranges(setup.start), **read_thresholds(setup.start), **ends}
            state.start_moving_averages(programs.train, thresholds, programs.place)
            state.start_biases(programs.train, setup.start, programs.place)
        self._checkpoint = TrainingCheckpoint(
            setup.checkpoints,
            self.training,
            setup.batches,
            (programs.train, programs.test),
            place=programs.place,
            best_dir=self.best_dir,
            ranks=setup.ranks,
        )

    def run(self) -> None:
        """Train until the last iteration or until the training is stopped early.

        Raises:
            Diverged: the loss, a weight or an output of an INT8 model is not finite.
            UserError: the reader yields no batch, or another rank failed.
            Interrupted: the process received a signal; the checkpoint has been written.
        """
        setup, training, total = self.setup, self.training, self._schedule.iterations
        batches = Prefetcher(
            self._endless_batches(), self._with_teacher, lambda: setup.batches.position, in_advance=cpu_cores.on_cpu()
        )
        with (
            cpu_cores.op_after_op(),
            existing_objects_frozen(),
            Progress("train", "iteration", total, done=training.iterations, shown=setup.progress, stays=True) as bar,
        ):
            try:
                while True:
                    self._settle()
                    if not setup.ranks.go_on(training.iterations < total and not training.stopped):
                        break
                    data, position = batches.take(last=training.iterations + 1 == total)
                    position = setup.ranks.ready(position)
                    # In every step, since an evaluation in Paddle leaves the process with one thread.
                    cores = cpu_cores.all_cores(setup.ranks.on_this_host)
                    with setup.interruption.held(), setup.ranks.stepping(), cores:
                        self._step(data)
                        self._checkpoint.note_step(position)
                    bar.update(1, **self._shown())
            except Interrupted:
                with setup.interruption.ignored():
                    self._checkpoint.save()
                raise
            finally:
                batches.close()  # ends the reader's threads now, not at garbage collection

    def save_last_if_none_is_best(self) -> None:
        """Write the INT8 model of the last weights if no evaluation has chosen a best model."""
        if not self.best_dir.exists():
            self._save_snapshot(self.best_dir)

    def _shown(self) -> dict[str, str]:
        shown = {"loss": f"{self.training.losses[-1][1]:.4f}"}
        if self.training.best:
            shown["best_agreement"] = f"{self.training.best[1]:.4f}"
        return shown

    def _with_teacher(self, data: _Feed) -> _Feed:
        teacher = self._programs.teacher
        return data if teacher is None else {**data, **teacher.outputs_of(data)}

    def _endless_batches(self) -> Generator[_Feed, None, None]:
        empty = 0
        while empty < 2:  # after resuming at the end of an epoch, the first iterator may be empty
            empty += 1
            for data in self._feeds():
                empty = 0
                yield data
        raise UserError("the training data gives no batch any more, expected at least one an epoch; check the reader")

    def _step(self, data: _Feed) -> None:
        training, ranks, rate = self.training, self.setup.ranks, self._programs.train.learning_rate
        state.seed_step(training.iterations * ranks.world + ranks.rank)
        if self._origin is not None:
            self._origin.remember()
        fetched = self._programs.runner.run(data)
        if not isinstance(rate, float):
            rate.step()
        loss, iteration = float(np.mean(fetched[0])), training.iterations + 1
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {iteration}{self._where(data)}; {LOWER_RATE}")
        if not np.isfinite(fetched[-1]).all():
            raise Diverged(
                f"iteration {iteration} leaves weights that are not finite (its loss was {loss:.4g})"
                f"{self._where(data)}; {LOWER_RATE}"
            )
        training.iterations = iteration
        training.losses.append((iteration, loss))

    def _where(self, data: _Feed) -> str:
        """Return where the step that just failed computes its first NaN or infinity, for a message; may be empty."""
        found = self._origin.find(data) if self._origin is not None else ""
        return f": {found}" if found else ""

    def _settle(self) -> None:
        """Run the evaluation and write the checkpoint that are due after the last iteration."""
        training, setup = self.training, self.setup
        iteration, best = training.iterations, training.best
        evaluated = bool(training.evaluations) and training.evaluations[-1][0] == iteration
        if (
            setup.scorer is not None
            and not evaluated
            and is_due(iteration, self._schedule.eval_iter, self._schedule.iterations)
        ):
            self._evaluate()
        last, checkpoints = iteration >= self._schedule.iterations, setup.checkpoints
        if checkpoints is not None and (training.best != best or last or checkpoints.due(iteration)):
            with setup.interruption.held():
                self._checkpoint.save()

    def _evaluate(self) -> None:
        training, setup = self.training, self.setup
        self._programs.runner.release_caches()
        if self._programs.teacher is not None:
            self._programs.teacher.release_caches()
        candidate = self._save_snapshot(self._work / "candidate")
        target, origin = self._schedule.target_metric, setup.origin_metric
        needs_map = target is not None or origin is not None
        agreement, map_ = self._snapshots.score(candidate, training.iterations, needs_map)
        with setup.interruption.held():
            training.evaluations.append((training.iterations, agreement))
            if training.best is None or agreement > training.best[1]:
                training.best = (training.iterations, agreement)
                shutil.rmtree(self.best_dir, ignore_errors=True)
                candidate.directory.rename(self.best_dir)
            else:
                shutil.rmtree(candidate.directory)
            training.stopped = self._metric_reached(map_) or why_stop(training.evaluations, setup.patience)

    def _metric_reached(self, map_: Optional[float]) -> str:
        """Return in one line which metric of ``TrainConfig`` is reached; empty: none."""
        target, origin = self._schedule.target_metric, self.setup.origin_metric
        if map_ is not None and origin and abs(map_ - origin) / origin <= _NEAR_ORIGIN:
            return f"the metric is within {_NEAR_ORIGIN:.1%} of origin_metric"
        if map_ is not None and target is not None and map_ > target:
            return f"target_metric {target} is reached"
        return ""

    def _save_snapshot(self, folder: Path) -> InferenceModel:
        shutil.rmtree(folder, ignore_errors=True)
        model, self.training.inventory = self._snapshots.save(self._programs.test, self.training.iterations, folder)
        return model
