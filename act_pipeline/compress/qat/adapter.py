"""A subclass of PaddleSlim's ``AutoCompression`` with six methods replaced, since 2.6.0 has no public hooks.

- ``_prepare_envs``: never uses ``fleet``; several processes are handled by `compress.qat.distributed`.
- ``_prepare_program``: runs Paddle's passes within `compress.paddleslim.fast_passes`, excludes constants
  from training, adds a loss (`compress.qat.detection_loss`), and moves the teacher out of the program
  (`compress.qat.teacher`) unless ``Distillation.teacher_cache_mb`` is 0.
- ``_compiled_program``: trains the weights of the unfolded float model (`compress.qat.unfolded_weights`), rounds
  with zero points (`compress.qat.zero_points`), adds checks for divergence (`execution.finite_checks`), and uses faster
  kernels on a CPU (`execution.cpu_kernels`).
- ``_start_train``: runs `compress.qat.loop`.
- ``_save_model``: keeps the files of the evaluated model instead of writing the model again.
- ``create_tmp_dir``: uses a unique name for every run; PaddleSlim names the folder by minute and parent process.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional
from unittest import mock

from act_pipeline.compress.paddleslim.fast_passes import fast_passes
from act_pipeline.compress.qat.distributed import averaging
from act_pipeline.compress.qat.loop import TrainingLoop
from act_pipeline.compress.qat.programs import Programs, Schedule
from act_pipeline.compress.qat.setup import Setup
from act_pipeline.compress.qat.teacher import Teacher, split_teacher
from act_pipeline.compress.qat.trainable_weights import trainable_weights
from act_pipeline.compress.qat.training import Training
from act_pipeline.compress.qat.unfolded_weights import unfold
from act_pipeline.compress.qat.zero_points import round_finely
from act_pipeline.execution import cpu_kernels, finite_checks
from act_pipeline.execution.cpu_cores import on_cpu
from act_pipeline.execution.runners import Runner, make_runner
from act_pipeline.graph.quick_building import quick_building

if TYPE_CHECKING:
    from paddleslim.auto_compression import AutoCompression
else:
    AutoCompression = object  # PaddleSlim is imported only when it is needed, in `make_adapter`


def make_adapter() -> type:
    """Return the subclass of PaddleSlim's ``AutoCompression``.

    Before calling ``compress()``, set the instance's ``setup`` (:class:`act_pipeline.compress.qat.setup.Setup`).
    Afterwards ``training`` (:class:`act_pipeline.compress.qat.training.Training`) is the result.
    """
    from paddleslim import auto_compression

    return type("Adapter", (_ReplacedMethods, auto_compression.AutoCompression), {})


class _ReplacedMethods(AutoCompression):
    """The methods of :func:`make_adapter`'s class that replace those of ``AutoCompression``."""

    setup: Setup
    training: Training
    _teacher: Optional[Teacher] = None
    _runner: Optional[Runner] = None

    def create_tmp_dir(self, base_dir: str, prefix: str = "tmp") -> str:
        return tempfile.mkdtemp(prefix=f"{prefix}_", dir=base_dir)

    def _prepare_envs(self) -> Any:
        # PaddleSlim uses fleet on every machine with two GPUs; `averaging` does not need it.
        executor, places, _ = super()._prepare_envs()
        return executor, places, False

    def _prepare_program(self, program: Any, *args: Any) -> Any:
        self._op_order = [op.output_arg_names[0] for op in program.global_block().ops if op.output_arg_names]
        with contextlib.ExitStack() as stack:
            for target, name, replacement in self._replaced_functions(trainable_weights(program)):
                stack.enter_context(mock.patch.object(target, name, replacement))
            stack.enter_context(fast_passes())
            stack.enter_context(quick_building())
            return super()._prepare_program(program, *args)

    def _replaced_functions(self, weights: Collection[str]) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Return module, name and replacement of functions that PaddleSlim builds its programs with.

        Args:
            weights: names of the parameters to train.
        """
        from paddleslim.auto_compression import compressor, create_compressed_program

        recover, build = compressor.recover_inference_program, compressor.build_distill_program
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (compressor, "recover_inference_program", functools.partial(_recover_with_constants, recover, weights)),
            (compressor, "build_distill_program", functools.partial(self._build_and_split, build)),
        ]
        if self.setup.distillation is not None:
            replaced.append((create_compressed_program, "_parse_distill_loss", self.setup.distillation.build))
        return replaced

    def _build_and_split(self, build: Callable[..., Any], *args: Any, **options: Any) -> Any:
        train_info, test_info = build(*args, **options)
        setup = self.setup
        if setup.teacher_cache_mb:
            self._teacher = split_teacher(
                train_info.program,
                self._exe,
                setup.one_image,
                setup.batch_size,
                budget_mb=setup.teacher_cache_mb,
                queries=setup.distillation.teacher_queries if setup.distillation is not None else None,
            )
        return train_info, test_info

    def _compiled_program(self, info: Any, strategy: str) -> Any:
        if info.optimizer is None:
            return super()._compiled_program(info, strategy)
        if not isinstance(info.learning_rate, float):
            # PaddleSlim quantizes into a new program, in which Paddle's executor does not find the schedule.
            info.program.lr_scheduler = info.learning_rate
        round_finely(info.program, self.setup.lowest)
        unfold(info.program, self.setup.factors, self._exe.place)
        finite_checks.guard_grids(info.program)
        if self.setup.ranks.world > 1:
            averaging.average(info, self.setup.ranks.world)
        fetches = [target.name for target in info.fetch_targets] + [finite_checks.watch_weights(info.program)]
        trained = cpu_kernels.in_quick_kernels(info.program) if on_cpu() else None
        compiled = super()._compiled_program(info, strategy)
        self._runner = make_runner(trained or compiled.program, fetches, self._exe.place)
        return compiled

    def _start_train(self, train_info: Any, test_info: Any, strategy: str, train_config: Any) -> Any:
        assert self._runner is not None
        place = self._exe.place
        self._loop = TrainingLoop(
            self.setup,
            Schedule.of(train_config, len(self.setup.batches)),
            Programs(train_info, test_info, self._runner, self._teacher, self._op_order, place),
            self.train_dataloader,
            Path(self.tmp_dir),
        )
        self.training = self._loop.training
        self._loop.run()
        self.final_metric = self.training.best[1] if self.training.best else -1.0
        return test_info

    def _save_model(self, test_info: Any, strategy: str, strategy_idx: int) -> None:
        self._loop.save_last_if_none_is_best()


def _recover_with_constants(recover: Callable[..., Any], weights: Collection[str], *args: Any) -> Any:
    """Return the output of PaddleSlim's ``recover_inference_program``, in which only ``weights`` are trained.

    A saved program does not say that indices and masks have no gradient. Paddle 2.6.2 computes some, and has no kernel
    that adds those of two readers.
    """
    from paddle.base.core import VarDesc

    recovered = recover(*args)
    for variable in recovered.list_vars():
        if variable.type == VarDesc.VarType.LOD_TENSOR and "float" not in str(variable.dtype):
            variable.stop_gradient = True
    for parameter in recovered.all_parameters():
        if parameter.name not in weights:
            parameter.trainable = False
            parameter.stop_gradient = True
    return recovered
