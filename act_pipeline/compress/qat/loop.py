"""The training loop: steps, evaluations, checkpoints, early stopping and interruption."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.accuracy_control.revert import read_ranges, read_thresholds
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.qat import state
from act_pipeline.compress.qat.divergence import is_due, why_stop
from act_pipeline.compress.qat.int8_snapshots import Int8Snapshots
from act_pipeline.compress.qat.resume.training_checkpoint import TrainingCheckpoint
from act_pipeline.compress.qat.setup import Setup
from act_pipeline.compress.qat.teacher import Teacher
from act_pipeline.compress.qat.training import Training
from act_pipeline.compress.qat.unfolded_weights import weight_ends
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.core.progress import Progress
from act_pipeline.execution import cpu_kernels
from act_pipeline.execution.finite_checks import LOWER_RATE, Diverged
from act_pipeline.execution.prefetcher import Prefetcher
from act_pipeline.execution.runners import Runner
from act_pipeline.graph.static_graph import what_there_is_stays

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
        self,
        setup: Setup,
        train_config: Any,
        infos: tuple[Any, Any],
        *,
        runner: Runner,
        teacher: Teacher | None,
        feeds: Callable[[], Iterator[_Feed]],
        op_order: Sequence[str],
        place: Any,
        work: Path,
    ) -> None:
        """Set the initial scales and biases, and resume from the checkpoint if there is one.

        Args:
            setup: the data, settings and callbacks of the training.
            train_config: PaddleSlim's ``TrainConfig``.
            infos: PaddleSlim's ``ProgramInfo`` of the training and of the test program; their variables are
                initialized, and no step was run.
            runner: runs the training program.
            teacher: computes the teacher's outputs of a batch; None: the training program computes them.
            feeds: yields the (remaining) batches of an epoch, by the names of the model's inputs.
            op_order: outputs of the float program's ops, see `compress.paddleslim.int8_program.in_order`.
            place: the device of the programs' variables.
            work: a temporary folder of this run.

        Raises:
            UserError: the checkpoint is damaged or belongs to another program.
        """
        self.setup, self._runner, self._teacher, self._feeds = setup, runner, teacher, feeds
        self._train_info, self._test_info = infos
        self._work, self.best_dir = work, work / "strategy_1"
        self.training = Training(InferenceModel(self.best_dir), OpInventory({}, []))
        epochs = (train_config.epochs or 0) * setup.batches_per_epoch
        self._total = train_config.train_iter or epochs or setup.batches_per_epoch
        if epochs:
            self._total = min(self._total, epochs)
        self._eval_iter, self._target_metric = train_config.eval_iter, train_config.target_metric
        self._snapshots = Int8Snapshots(setup.scorer, setup.one_image, setup.op_types, op_order, setup.factors)
        if setup.start is not None:
            ends = weight_ends(state.program_of(self._train_info), setup.factors)
            thresholds = {**read_ranges(setup.start), **read_thresholds(setup.start), **ends}
            state.start_moving_averages(self._train_info, thresholds, place)
            state.start_biases(self._train_info, setup.start, place)
        self._checkpoint = TrainingCheckpoint(
            setup.checkpoints,
            self.training,
            setup.batches,
            infos,
            place=place,
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
        setup, training, total = self.setup, self.training, self._total
        batches = Prefetcher(
            self._endless_batches(), self._taught, lambda: setup.batches.position, in_advance=cpu_kernels.on_cpu()
        )
        with (
            cpu_kernels.op_after_op(),
            what_there_is_stays(),
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
                    cores = cpu_kernels.all_cores(setup.ranks.on_this_host)
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

    def _taught(self, data: _Feed) -> _Feed:
        return data if self._teacher is None else {**data, **self._teacher.outputs_of(data)}

    def _endless_batches(self) -> Generator[_Feed, None, None]:
        empty = 0
        while empty < 2:  # after resuming at the end of an epoch, the first iterator may be empty
            empty += 1
            for data in self._feeds():
                empty = 0
                yield data
        raise UserError("the training data gives no batch any more, expected at least one an epoch; check the reader")

    def _step(self, data: _Feed) -> None:
        training, ranks, rate = self.training, self.setup.ranks, self._train_info.learning_rate
        state.seed_step(training.iterations * ranks.world + ranks.rank)
        fetched = self._runner.run(data)
        if not isinstance(rate, float):
            rate.step()
        loss, iteration = float(np.mean(fetched[0])), training.iterations + 1
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {iteration}; {LOWER_RATE}")
        if not np.isfinite(fetched[-1]).all():
            raise Diverged(
                f"iteration {iteration} leaves weights that are not finite (its loss was {loss:.4g}); {LOWER_RATE}"
            )
        training.iterations = iteration
        training.losses.append((iteration, loss))

    def _settle(self) -> None:
        """Run the evaluation and write the checkpoint that are due after the last iteration."""
        training, setup = self.training, self.setup
        iteration, best = training.iterations, training.best
        evaluated = bool(training.evaluations) and training.evaluations[-1][0] == iteration
        if setup.scorer is not None and not evaluated and is_due(iteration, self._eval_iter, self._total):
            self._evaluate()
        last, checkpoints = iteration >= self._total, setup.checkpoints
        if checkpoints is not None and (training.best != best or last or checkpoints.due(iteration)):
            with setup.interruption.held():
                self._checkpoint.save()

    def _evaluate(self) -> None:
        training, setup = self.training, self.setup
        self._runner.release_caches()
        if self._teacher is not None:
            self._teacher.release_caches()
        candidate = self._save_snapshot(self._work / "candidate")
        target, origin = self._target_metric, setup.origin_metric
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
        target, origin = self._target_metric, self.setup.origin_metric
        if map_ is not None and origin and abs(map_ - origin) / origin <= _NEAR_ORIGIN:
            return f"the metric is within {_NEAR_ORIGIN:.1%} of origin_metric"
        if map_ is not None and target is not None and map_ > target:
            return f"target_metric {target} is reached"
        return ""

    def _save_snapshot(self, folder: Path) -> InferenceModel:
        shutil.rmtree(folder, ignore_errors=True)
        model, self.training.inventory = self._snapshots.save(self._test_info, self.training.iterations, folder)
        return model
