"""Quantization-aware training with soft-label distillation, by PaddleSlim's Auto Compression Toolkit (ACT).

The training is `paddleslim.auto_compression.AutoCompression`'s own, with six of its methods replaced (all private in
PaddleSlim 2.6.0; there is no public hook for any of them):

- ``_prepare_envs``: never ``fleet``; several processes are `ranks` and `averaging`;
- ``_prepare_program``: Paddle's passes run as `compress.paddleslim.int8_program.fast_passes`, constants are not
trained, there is one loss more
  (`detection_loss`), and the teacher is taken out of the program (`teacher`), unless ``Distillation.teacher_cache_mb``
  is 0;
- ``_compiled_program``: the weights are trained as the float model has them (`compress.qat.unfolded_weights`), the
training program says whether
  it diverges (`execution.finite_checks`), and runs in quicker kernels on a CPU (`cpu_kernels`);
- ``_start_train``: a progress bar, an evaluation before the first iteration and after the last one, an early end where
  nothing is gained (`compress.qat.divergence`), checkpoints, an orderly end at a signal;
- ``_save_model``: what is kept is the model that was evaluated: every evaluation writes the INT8 model
  (`compress.paddleslim.int8_program.convert`) and runs it as it will be run, and the best one stays;
- ``create_tmp_dir``: a name of its own for every run; stock names the folder by minute and parent process.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import numpy as np

from act_pipeline.calibration.feeds import model_feed
from act_pipeline.compress.accuracy_control.revert import read_ranges, read_thresholds
from act_pipeline.compress.paddleslim import int8_program
from act_pipeline.compress.paddleslim.patches import own_scope, quick_building, quick_walks
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import skip_patterns
from act_pipeline.compress.qat import state
from act_pipeline.compress.qat.detection_loss import DetectionDistillation
from act_pipeline.compress.qat.distributed import averaging
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.divergence import is_due, why_stop
from act_pipeline.compress.qat.int8_snapshots import Candidates, Scorer
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.compress.qat.resume.training_checkpoint import Keeper
from act_pipeline.compress.qat.teacher import Teacher, split_teacher
from act_pipeline.compress.qat.trainable_weights import trainable_weights
from act_pipeline.compress.qat.training import Batches, Training
from act_pipeline.compress.qat.unfolded_weights import read_factors, unfold, weight_ends
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.core.interruption import Interruption
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.execution import cpu_kernels, finite_checks
from act_pipeline.execution.finite_checks import LOWER_RATE, Diverged
from act_pipeline.execution.memory import TakenAhead
from act_pipeline.execution.prefetcher import Ahead
from act_pipeline.execution.runners import Runner, make_runner
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import what_there_is_stays

# ACT stops when the metric is this near, relatively, to the float model's (given as TrainConfig.origin_metric).
_NEAR_ORIGIN = 0.005
# Times the float model's activations; what a training comes to take is more (RT-DETR-R18: 5).
_TAKEN_AHEAD = 3


def train(
    model: InferenceModel,
    config: Config,
    batches: Batches,
    batches_per_epoch: int,
    scorer: Scorer | None,
    save_dir: Path,
    device: str = "CPU",
    origin_metric: float | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    interruption: Interruption | None = None,
    start: InferenceModel | None = None,
    ranks: Ranks = ALONE,
) -> Training:
    """Train the quantized model and save the best one.

    Args:
        model: the float model, its constants folded; its folder is written to.
        config: ``Distillation``, ``QuantAware`` and ``TrainConfig``.
        batches: gives an epoch's batches, and can go on within one.
        batches_per_epoch: how many those are.
        scorer: of INT8 models; None: no evaluation, the last weights are kept.
        save_dir: an existing folder for the INT8 model.
        device: ``CPU`` or ``GPU``.
        origin_metric: the float model's metric, if ACT shall stop when it is reached.
        progress: show a progress bar on stderr.
        checkpoints: where to go on from, and where to write; None: neither.
        interruption: the signals that end the training between two steps.
        start: a calibrated INT8 model of ``model``, from whose scales and biases the training starts; None:
            PaddleSlim's start, whose scales the first batches overwrite.
        ranks: the processes that train together, of which the first alone evaluates and saves; ``batches`` are a share.

    Raises:
        UserError: the training diverges.
        Interrupted: a signal came; what was done is in the checkpoint.
        MemoryError, RuntimeError: memory does not suffice.
    """
    import paddle

    paddle.set_device(device.lower())
    averaging.connect(ranks, device)
    with quiet_upstream(), own_scope(), paddle.utils.unique_name.guard():
        from paddleslim.auto_compression import AutoCompression

        class_ = _make_compression_class(AutoCompression)
        strategies, train_config = config.to_act()
        patterns = skip_patterns(strategies["QuantAware"]["not_quant_pattern"])
        strategies["QuantAware"]["not_quant_pattern"] = patterns
        distillation = DetectionDistillation.of(config, model, int8_program.TEACHER_PREFIX)
        if distillation is not None:
            strategies["Distillation"].update(node=distillation.nodes, loss="l2")
        # Compared by the caller already; ACT would evaluate the float model once more in the slow executor.
        train_config.pop("origin_metric", None)
        summary = inspect_model(model)
        feed_names = list(summary.inputs)
        first: dict[str, np.ndarray] = {}

        def feeds() -> Iterator[dict[str, np.ndarray]]:
            for batch in batches():
                feed = model_feed(config, feed_names, batch)
                first.update({} if first else feed)
                yield feed

        with quick_walks():
            compression = class_(
                model_dir=str(model.directory),
                model_filename=model.model_filename,
                params_filename=model.params_filename,
                save_dir=str(save_dir),
                config={**strategies, "TrainConfig": train_config},
                train_dataloader=feeds,
            )
        compression.prepare_run(
            batches_per_epoch,
            scorer,
            origin_metric,
            progress,
            config.quant_aware.quantize_op_types,
            config.distillation.teacher_cache_mb,
        )
        # PaddleSlim has looked at the first batch already, to see whether it is a dict.
        compression.prepare_survival(batches, checkpoints, interruption or Interruption(), first)
        compression.start = start
        compression.distillation, compression.factors = distillation, read_factors(model)
        compression.patience = config.train_config.patience
        compression.ranks = ranks
        batch_size = len(next(iter(first.values())))
        wanted = _TAKEN_AHEAD * summary.activation_bytes(batch_size) if device == "CPU" else 0
        with contextlib.closing(TakenAhead(wanted)) as compression.memory:
            compression.compress()
        training = compression.training
    if ranks.leads:
        training.model = InferenceModel.load(save_dir)
    return training


def _make_compression_class(base: type) -> type:
    """Return the subclass; made here because PaddleSlim is not imported before it is needed."""
    from paddleslim.auto_compression import compressor, create_compressed_program

    class Compression(base):  # type: ignore[misc, valid-type]
        def prepare_run(
            self,
            batches_per_epoch: int,
            scorer: Scorer | None,
            origin_metric: float | None,
            progress: bool,
            op_types: Sequence[str],
            teacher_cache_mb: float,
        ) -> None:
            self.training = Training(InferenceModel(Path(self.final_dir)), OpInventory({}, []))
            self._batches_per_epoch = batches_per_epoch
            self._scorer = scorer
            self._origin_metric = origin_metric
            self._progress = progress
            self._op_types = list(op_types)
            self._teacher_cache_mb = teacher_cache_mb
            self._runner: Optional[Runner] = None
            self._teacher: Optional[Teacher] = None
            self.distillation: Optional[DetectionDistillation] = None
            self.factors: Mapping[str, np.ndarray] = {}

        def prepare_survival(
            self,
            batches: Batches,
            checkpoints: Checkpoints | None,
            interruption: Interruption,
            probe: Mapping[str, np.ndarray],
        ) -> None:
            self._batches = batches
            self._probe = {name: value[:1] for name, value in probe.items()}
            self._batch_size = len(next(iter(probe.values())))
            self._checkpoints = checkpoints
            self._interruption = interruption

        def create_tmp_dir(self, base_dir: str, prefix: str = "tmp") -> str:
            return tempfile.mkdtemp(prefix=f"{prefix}_", dir=base_dir)

        def _prepare_envs(self) -> Any:
            # PaddleSlim takes any machine with two GPUs for a distributed training; `averaging` does without its fleet.
            executor, places, _ = super()._prepare_envs()
            return executor, places, False

        def _prepare_program(self, program: Any, *args: Any) -> Any:
            recover = compressor.recover_inference_program
            weights = trainable_weights(program)
            self._op_order = [op.output_arg_names[0] for op in program.global_block().ops if op.output_arg_names]

            def recover_weights_only(*recover_args: Any) -> Any:
                recovered = recover(*recover_args)
                for parameter in recovered.all_parameters():
                    if parameter.name not in weights:
                        parameter.trainable = False
                        parameter.stop_gradient = True
                return recovered

            build = compressor.build_distill_program

            def build_and_split(*build_args: Any, **options: Any) -> Any:
                train_info, test_info = build(*build_args, **options)
                if self._teacher_cache_mb:
                    self._teacher = split_teacher(
                        train_info.program,
                        self._exe,
                        self._probe,
                        self._batch_size,
                        self._teacher_cache_mb,
                        self.distillation.teacher_queries if self.distillation is not None else None,
                    )
                return train_info, test_info

            with contextlib.ExitStack() as stack:
                for target, name, replacement in (
                    (compressor, "recover_inference_program", recover_weights_only),
                    (compressor, "build_distill_program", build_and_split),
                    *(
                        [(create_compressed_program, "_parse_distill_loss", self.distillation.build)]
                        if self.distillation is not None
                        else []
                    ),
                ):
                    stack.enter_context(mock.patch.object(target, name, replacement))
                stack.enter_context(int8_program.fast_passes())
                stack.enter_context(quick_building())
                return super()._prepare_program(program, *args)

        def _compiled_program(self, info: Any, strategy: str) -> Any:
            trained = None
            if info.optimizer is not None:
                if not isinstance(info.learning_rate, float):
                    # PaddleSlim quantizes into a new program, which Paddle's executor no longer tells the rate.
                    info.program.lr_scheduler = info.learning_rate
                unfold(info.program, self.factors, self._exe.place)
                finite_checks.guard_grids(info.program)
                if self.ranks.world > 1:
                    averaging.average(info, self.ranks.world)
                fetches = [target.name for target in info.fetch_targets] + [finite_checks.watch_weights(info.program)]
                if cpu_kernels.on_cpu():
                    trained = cpu_kernels.in_quick_kernels(info.program)
            compiled = super()._compiled_program(info, strategy)
            if info.optimizer is not None:
                self._runner = make_runner(trained or compiled.program, fetches, self._exe.place)
            return compiled

        def _start_train(self, train_info: Any, test_info: Any, strategy: str, train_config: Any) -> Any:
            from tqdm import tqdm

            total = train_config.train_iter or (train_config.epochs or 1) * self._batches_per_epoch
            if train_config.epochs:
                total = min(total, train_config.epochs * self._batches_per_epoch)
            training = self.training
            self._candidates = Candidates(self._scorer, self._probe, self._op_types, self._op_order, self.factors)
            if self.start is not None:
                ends = weight_ends(state.program_of(train_info), self.factors)
                thresholds = {**read_ranges(self.start), **read_thresholds(self.start), **ends}
                state.start_moving_averages(train_info, thresholds, self._exe.place)
                state.start_biases(train_info, self.start, self._exe.place)
            self._keeper = Keeper(
                self._checkpoints,
                training,
                self._batches,
                (train_info, test_info),
                self._exe.place,
                self._best_dir,
                self.ranks,
            )
            self.memory.close()
            feeds = Ahead(
                self._endless_batches(), self._taught, lambda: self._batches.position, in_advance=cpu_kernels.on_cpu()
            )
            with (
                cpu_kernels.op_after_op(),
                what_there_is_stays(),
                tqdm(
                    total=total, initial=training.iterations, desc="train", unit="iter", disable=not self._progress
                ) as bar,
            ):
                try:
                    while True:
                        self._settle(test_info, train_config, total)
                        if not self.ranks.go_on(training.iterations < total and not training.stopped):
                            break
                        data, position = feeds.take(last=training.iterations + 1 == total)
                        position = self.ranks.ready(position)
                        # Anew each time: Paddle's engines leave one thread behind when they have evaluated.
                        cores = cpu_kernels.all_cores(self.ranks.on_this_host)
                        with self._interruption.held(), self.ranks.stepping(), cores:
                            self._step(train_info, data)
                            self._keeper.note_step(position)
                        bar.update()
                        shown = {"loss": f"{training.losses[-1][1]:.4f}"}
                        if training.best:
                            shown["best_agreement"] = f"{training.best[1]:.4f}"
                        bar.set_postfix(shown)
                except Interrupted:
                    with self._interruption.ignored():
                        self._keeper.save()
                    raise
                finally:
                    feeds.close()  # the reader's threads end here, not when they are collected
            self.final_metric = training.best[1] if training.best else -1.0
            return test_info

        def _taught(self, data: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            return data if self._teacher is None else {**data, **self._teacher.outputs_of(data)}

        def _endless_batches(self) -> Generator[Mapping[str, np.ndarray], None, None]:
            empty = 0
            while empty < 2:  # a checkpoint may be of the end of an epoch, of which nothing is left
                empty += 1
                for data in self.train_dataloader():
                    empty = 0
                    yield data
            raise UserError(
                "the training data gives no batch any more, expected at least one an epoch; check the reader"
            )

        def _step(self, train_info: Any, data: Mapping[str, np.ndarray]) -> None:
            training = self.training
            state.seed_step(training.iterations * self.ranks.world + self.ranks.rank)
            fetched = self._runner.run(data)
            if not isinstance(train_info.learning_rate, float):
                train_info.learning_rate.step()
            loss, iteration = float(np.mean(fetched[0])), training.iterations + 1
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at iteration {iteration}; {LOWER_RATE}")
            if not np.isfinite(fetched[-1]).all():
                raise Diverged(
                    f"iteration {iteration} leaves weights that are not finite (its loss was {loss:.4g}); {LOWER_RATE}"
                )
            training.iterations = iteration
            training.losses.append((iteration, loss))

        def _settle(self, test_info: Any, train_config: Any, total: int) -> None:
            """Do what is due after the iteration that was last: an evaluation, a checkpoint."""
            training = self.training
            iteration = training.iterations
            best, last = training.best, iteration >= total
            evaluated = bool(training.evaluations) and training.evaluations[-1][0] == iteration
            if self._scorer is not None and not evaluated and is_due(iteration, train_config.eval_iter, total):
                self._evaluate(test_info, train_config)
            checkpoints = self._checkpoints
            if checkpoints is not None and (training.best != best or last or checkpoints.due(iteration)):
                with self._interruption.held():
                    self._keeper.save()

        def _evaluate(self, test_info: Any, train_config: Any) -> None:
            training = self.training
            self._runner.rest()
            if self._teacher is not None:
                self._teacher.rest()
            shutil.rmtree(Path(self.tmp_dir, "candidate"), ignore_errors=True)
            candidate = self._save_candidate(test_info, "candidate")
            target, origin = train_config.target_metric, self._origin_metric
            agreement, map_ = self._candidates.score(
                candidate, training.iterations, target is not None or origin is not None
            )
            with self._interruption.held():
                training.evaluations.append((training.iterations, agreement))
                if training.best is None or agreement > training.best[1]:
                    training.best = (training.iterations, agreement)
                    shutil.rmtree(self._best_dir, ignore_errors=True)
                    candidate.directory.rename(self._best_dir)
                else:
                    shutil.rmtree(candidate.directory)
                if target is not None and map_ is not None and map_ > target:
                    training.stopped = f"target_metric {target} is reached"
                if origin and map_ is not None and abs(map_ - origin) / origin <= _NEAR_ORIGIN:
                    training.stopped = f"the metric is within {_NEAR_ORIGIN:.1%} of origin_metric"
                training.stopped = training.stopped or why_stop(training.evaluations, self.patience)

        def _save_candidate(self, test_info: Any, name: str) -> InferenceModel:
            folder = Path(self.tmp_dir, name)
            model, self.training.inventory = self._candidates.save(test_info, self.training.iterations, folder)
            return model

        @property
        def _best_dir(self) -> Path:
            return Path(self.tmp_dir, "strategy_1")  # where AutoCompression looks for what it copies to save_dir

        def _save_model(self, test_info: Any, strategy: str, strategy_idx: int) -> None:
            if not self._best_dir.exists():
                self._save_candidate(test_info, self._best_dir.name)

    return Compression
