"""Quantization-aware training with soft-label distillation, by PaddleSlim's Auto Compression Toolkit (ACT).

The training is `paddleslim.auto_compression.AutoCompression`'s own, with four of its methods replaced (all private in
PaddleSlim 2.6.0; there is no public hook for any of them):

- ``_prepare_program``: Paddle's passes run as `quant_graph.fast_passes`, and constants are not trained;
- ``_start_train``: a progress bar, the last iteration evaluated too, a stop at a loss that is not finite;
- ``_save_model``: what is kept is the model that was evaluated: every evaluation writes the INT8 model
  (`quant_graph.convert`) and runs it as it will be run, and the best one stays;
- ``create_tmp_dir``: a name of its own for every run; stock names the folder by minute and parent process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from act_pipeline.compress import quant_graph
from act_pipeline.compress.inventory import OpInventory
from act_pipeline.config import Config
from act_pipeline.engines.model_files import inspect_model
from act_pipeline.errors import UserError
from act_pipeline.model import InferenceModel

# ACT stops when the metric is this near, relatively, to the float model's (given as TrainConfig.origin_metric).
_NEAR_ORIGIN = 0.005


@dataclass
class Training:
    """What a training did.

    Attributes:
        model: the INT8 model as saved.
        inventory: its INT8 ops.
        iterations: how many were run.
        evaluations: ``(iteration, mAP)`` of each evaluation between iterations.
        losses: ``(iteration, loss)`` of every iteration.
        stopped: why it ended early; empty if it did not.
    """

    model: InferenceModel
    inventory: OpInventory
    iterations: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""


def train(
    model: InferenceModel,
    config: Config,
    batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
    batches_per_epoch: int,
    score: Callable[[InferenceModel], float] | None,
    save_dir: Path,
    device: str = "CPU",
    origin_metric: float | None = None,
    progress: bool = True,
) -> Training:
    """Train the quantized model and save the best one.

    Args:
        model: the float model, its constants folded; its folder is written to.
        config: ``Distillation``, ``QuantAware`` and ``TrainConfig``.
        batches: gives an epoch's batches.
        batches_per_epoch: how many those are.
        score: the metric of an INT8 model, in 0..1; None: no evaluation, the last weights are kept.
        save_dir: an existing folder for the INT8 model.
        device: ``CPU`` or ``GPU``.
        origin_metric: the float model's metric, if ACT shall stop when it is reached.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the loss is not finite before a first evaluation, or memory does not suffice.
    """
    import paddle

    paddle.set_device(device.lower())
    with quiet_upstream(), _own_scope():
        from paddleslim.auto_compression import AutoCompression

        class_ = _make_compression_class(AutoCompression)
        strategies, train_config = config.to_act()
        # Compared by the caller already; ACT would evaluate the float model once more in the slow executor.
        train_config.pop("origin_metric", None)
        feed_names = list(inspect_model(model).inputs)

        def feeds() -> Iterator[dict[str, np.ndarray]]:
            for batch in batches():
                yield {name: batch[source] for name, source in feed_sources(config, feed_names, batch).items()}

        compression = class_(
            model_dir=str(model.directory),
            model_filename=model.model_filename,
            params_filename=model.params_filename,
            save_dir=str(save_dir),
            config={**strategies, "TrainConfig": train_config},
            train_dataloader=feeds,
        )
        compression.prepare_run(batches_per_epoch, score, origin_metric, progress, config.quant_aware.quantize_op_types)
        try:
            compression.compress()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "ResourceExhausted" in str(error) or "Out of memory" in str(error):
                raise UserError(
                    "memory does not suffice for training; lower EvalReader.batch_size in the reader, to 1 if need be"
                ) from error
            raise
        training = compression.training
    training.model = InferenceModel.load(save_dir)
    return training


def feed_sources(config: Config, feed_names: Sequence[str], batch: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return model input -> reader name (``Global.input_list`` may rename)."""
    listed = config.global_.input_list
    renamed = {model: reader for reader, model in listed.items()} if isinstance(listed, dict) else {}
    sources = {name: renamed.get(name, name) for name in feed_names}
    for name, source in sources.items():
        if source not in batch:
            raise UserError(
                f"{config.path}: the reader has no input '{name}' for the model, it has {', '.join(sorted(batch))}; "
                "name it in Global.input_list"
            )
    return sources


def _make_compression_class(base: type) -> type:
    """Return the subclass; made here because PaddleSlim is not imported before it is needed."""
    from paddleslim.auto_compression import compressor

    class Compression(base):  # type: ignore[misc, valid-type]
        def prepare_run(
            self,
            batches_per_epoch: int,
            score: Callable[[InferenceModel], float] | None,
            origin_metric: float | None,
            progress: bool,
            op_types: Sequence[str],
        ) -> None:
            self.training = Training(InferenceModel(Path(self.final_dir)), OpInventory({}, []))
            self._batches_per_epoch = batches_per_epoch
            self._score = score
            self._origin_metric = origin_metric
            self._progress = progress
            self._op_types = list(op_types)

        def create_tmp_dir(self, base_dir: str, prefix: str = "tmp") -> str:
            return tempfile.mkdtemp(prefix=f"{prefix}_", dir=base_dir)

        def _prepare_program(self, program: Any, *args: Any) -> Any:
            recover = compressor.recover_inference_program
            weights = trainable_weights(program)

            def recover_weights_only(*recover_args: Any) -> Any:
                recovered = recover(*recover_args)
                for parameter in recovered.all_parameters():
                    if parameter.name not in weights:
                        parameter.trainable = False
                        parameter.stop_gradient = True
                return recovered

            with mock.patch.object(compressor, "recover_inference_program", recover_weights_only):
                with quant_graph.fast_passes():
                    return super()._prepare_program(program, *args)

        def _start_train(self, train_info: Any, test_info: Any, strategy: str, train_config: Any) -> Any:
            total = train_config.train_iter or (train_config.epochs or 1) * self._batches_per_epoch
            if train_config.epochs:
                total = min(total, train_config.epochs * self._batches_per_epoch)
            training = self.training
            best = -1.0
            from tqdm import tqdm

            with tqdm(total=total, desc="train", unit="iter", disable=not self._progress) as bar:
                while training.iterations < total and not training.stopped:
                    for data in self.train_dataloader():
                        fetched = self._exe.run(train_info.program, feed=data, fetch_list=train_info.fetch_targets)
                        loss = float(np.mean(fetched[0]))
                        if not isinstance(train_info.learning_rate, float):
                            train_info.learning_rate.step()
                        training.iterations += 1
                        training.losses.append((training.iterations, loss))
                        bar.update()
                        shown = {"loss": f"{loss:.4f}"}
                        if training.evaluations:
                            shown["best_mAP"] = f"{best:.4f}"
                        bar.set_postfix(shown)
                        if not math.isfinite(loss):
                            if not training.evaluations:
                                raise UserError(
                                    f"the loss is {loss} at iteration {training.iterations}, before an evaluation; "
                                    "lower TrainConfig.learning_rate"
                                )
                            training.stopped = f"the loss was {loss} at iteration {training.iterations}"
                            break
                        last = training.iterations == total
                        if self._score is not None and (last or training.iterations % train_config.eval_iter == 0):
                            best = self._evaluate(test_info, train_config, best)
                        if last or training.stopped:
                            break
            self.final_metric = best
            return test_info

        def _evaluate(self, test_info: Any, train_config: Any, best: float) -> float:
            training = self.training
            candidate = self._save_candidate(test_info, "candidate")
            metric = self._score(candidate)
            training.evaluations.append((training.iterations, metric))
            if metric > best:
                best = metric
                shutil.rmtree(self._best_dir, ignore_errors=True)
                candidate.directory.rename(self._best_dir)
            else:
                shutil.rmtree(candidate.directory)
            if train_config.target_metric is not None and metric > train_config.target_metric:
                training.stopped = f"target_metric {train_config.target_metric} is reached"
            origin = self._origin_metric
            if origin and abs(best - origin) / origin <= _NEAR_ORIGIN:
                training.stopped = f"the metric is within {_NEAR_ORIGIN:.1%} of origin_metric"
            return best

        def _save_candidate(self, test_info: Any, name: str) -> InferenceModel:
            """Write the INT8 model of the weights as they are now; the training's own variables stay as they were."""
            import paddle

            trained = paddle.static.global_scope()
            program = getattr(test_info.program, "_program", test_info.program)
            scope, place = paddle.static.Scope(), paddle.CPUPlace()
            for variable in program.list_vars():
                if variable.persistable and variable.name not in ("feed", "fetch"):
                    value = np.array(trained.find_var(variable.name).get_tensor())
                    scope.var(variable.name).get_tensor().set(value, place)
            folder = Path(self.tmp_dir, name)
            folder.mkdir()
            model, self.training.inventory = quant_graph.save_int8(
                program,
                scope,
                place,
                test_info.feed_target_names,
                [target.name for target in test_info.fetch_targets],
                self._op_types,
                folder,
            )
            return model

        @property
        def _best_dir(self) -> Path:
            return Path(self.tmp_dir, "strategy_1")  # where AutoCompression looks for what it copies to save_dir

        def _save_model(self, test_info: Any, strategy: str, strategy_idx: int) -> None:
            if not self._best_dir.exists():
                self._save_candidate(test_info, self._best_dir.name)

    return Compression


def trainable_weights(program: Any) -> set[str]:
    """Return the parameters that training may change: weights and biases of convolutions, matmuls and norms.

    The others are constants of the graph (anchors, position embeddings). PaddleSlim would train these too: it takes
    every float variable of an inference program for a weight.
    """
    weights: set[str] = set()
    linear_outputs: set[str] = set()
    block = program.global_block()

    def persistable(names: Sequence[str]) -> set[str]:
        return {name for name in names if block.has_var(name) and block.var(name).persistable}

    for op in block.ops:
        if op.type in ("conv2d", "depthwise_conv2d", "conv2d_transpose"):
            weights |= persistable(op.input("Filter"))
            linear_outputs.update(op.output_arg_names)
        elif op.type in ("matmul_v2", "matmul", "mul"):
            weights |= persistable([*op.input("X"), *op.input("Y")])
            linear_outputs.update(op.output_arg_names)
        elif op.type in ("batch_norm", "layer_norm", "group_norm"):
            weights |= persistable([*op.input("Scale"), *op.input("Bias")])
        elif op.type == "elementwise_add" and op.input("X")[0] in linear_outputs:
            # A bias has one value a channel, whether it is stored as [C] or as [1, C, 1, 1].
            weights |= {name for name in persistable(op.input("Y")) if _is_vector(block.var(name).shape)}
    return weights


def _is_vector(shape: Sequence[int]) -> bool:
    return math.prod(shape) == max(shape)


@contextlib.contextmanager
def _own_scope() -> Iterator[None]:
    """Give the run a scope of its own: ACT keeps its variables in the global one, where the next would find them."""
    import paddle

    with paddle.static.scope_guard(paddle.static.Scope()):
        yield


@contextlib.contextmanager
def quiet_upstream() -> Iterator[None]:
    """Keep the log lines and warnings of Paddle and PaddleSlim below the level of errors, except where asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
