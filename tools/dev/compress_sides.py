"""The two sides of `DEV.compress_run`, each for a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from act_pipeline.calibration.feeds import model_feed
from act_pipeline.compress.plan.op_selection import skip_patterns
from act_pipeline.compress.qat.detection_loss import DETECTION
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.data import Reader
from act_pipeline.evaluation import evaluate
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import static_mode
from tools.dev.compress_run import Clock


class ProgramEngine:
    """A program in the training's executor as an engine, for the callback that stock ACT evaluates by.

    PaddleSlim's example (``example/auto_compression/detection/run.py``, ``eval_function``) runs
    ``exe.run(program, feed, fetch_list, return_numpy=False)`` image by image and hands the boxes to a COCO metric.
    """

    name, precision, device = "paddle_executor", "int8", "CPU"

    def __init__(self, executor: Any, program: Any, feed_names: Sequence[str], targets: Sequence[Any]) -> None:
        self.threads = available_cpus()
        self._run = lambda feed: executor.run(program, feed=feed, fetch_list=list(targets), return_numpy=False)
        self._feed_names = feed_names

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        bbox, bbox_num = self._run({name: inputs[name] for name in self._feed_names})[:2]
        return {"bbox": np.array(bbox), "bbox_num": np.array(bbox_num)}

    def close(self) -> None:
        """Nothing is held."""

    def versions(self) -> dict[str, str]:
        """Return nothing: the record has the versions."""
        return {}


def run_stock(config: Config, reader: Reader, work: Path, clock: Clock) -> dict[str, Any]:
    """Run PaddleSlim's ACT as it is."""
    import paddle

    paddle.enable_static()
    metrics: list[float] = []
    losses: list[float] = []
    with clock.stage("prepare"), quiet_upstream():
        from paddleslim.auto_compression import AutoCompression

        model = InferenceModel.load(
            config.global_.model_dir, config.global_.model_filename, config.global_.params_filename
        )
        feed_names = list(inspect_model(model).inputs)
        batches = reader.loader("train")  # one, as ours: PaddleSlim's look at the first batch begins an epoch of both

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches():
            yield model_feed(config, feed_names, batch)

    def score(executor: Any, program: Any, names: Sequence[str], targets: Sequence[Any]) -> float:
        with clock.stage("evaluate"):
            found = evaluate(ProgramEngine(executor, program, names, targets), reader, progress=False)
        metrics.append(found.map)
        return found.map

    class Timed(AutoCompression):  # reads the clock, and notes the losses that go by
        def _prepare_program(self, *args: Any) -> Any:
            with clock.stage("prepare"):
                return super()._prepare_program(*args)

        def _start_train(self, train_info: Any, *args: Any) -> Any:
            run = self._exe.run

            def noted(program: Any = None, *more: Any, **options: Any) -> Any:
                fetched = run(program, *more, **options)
                if program is train_info.program:
                    losses.append(float(np.mean(fetched[0])))
                return fetched

            with clock.stage("train"), mock.patch.object(self._exe, "run", noted):
                return super()._start_train(train_info, *args)

        def _save_model(self, *args: Any) -> Any:
            with clock.stage("save"):
                return super()._save_model(*args)

    strategies, train_config = config.to_act()
    if strategies["Distillation"]["loss"] == DETECTION:  # which ACT does not know
        strategies["Distillation"]["loss"] = "soft_label"
    quantization = strategies["QuantAware"]
    quantization["not_quant_pattern"] = skip_patterns(quantization["not_quant_pattern"])
    with quiet_upstream():
        compression = Timed(
            model_dir=str(model.directory),
            model_filename=model.model_filename,
            params_filename=model.params_filename,
            save_dir=str(work / "int8"),
            config={**strategies, "TrainConfig": train_config},
            train_dataloader=feeds,
            eval_callback=score,
        )
        compression.compress()
    return _row(losses, metrics, work / "int8")


def run_ours(config: Config, reader: Reader, work: Path, clock: Clock) -> dict[str, Any]:
    """Run :func:`act_pipeline.compress.compress`; what it does beyond stock counts, such as the float model's mAP."""
    from act_pipeline.compress import pipeline
    from act_pipeline.compress.judge import Judge
    from act_pipeline.compress.ptq import quantizer
    from act_pipeline.compress.qat import int8_snapshots, loop, trainer

    def timed(stage: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with clock.stage(stage):
                return function(*args, **options)

        return run

    make_adapter = trainer.make_adapter

    def timed_adapter() -> type:
        class Timed(make_adapter()):  # type: ignore[misc]
            def _prepare_program(self, *args: Any) -> Any:
                with clock.stage("prepare"):
                    return super()._prepare_program(*args)

            def _start_train(self, *args: Any) -> Any:
                with clock.stage("train"):
                    return super()._start_train(*args)

        return Timed

    patches = (
        (trainer, "make_adapter", timed_adapter),
        (loop, "why_stop", lambda *arguments: ""),  # both sides run as many iterations
        (pipeline, "check_worth", lambda *arguments: None),  # seconds do not depend on it, and random weights have none
        (pipeline, "_prepare", timed("prepare", pipeline._prepare)),
        (Judge, "evaluate_float", timed("evaluate", Judge.evaluate_float)),
        (Judge, "detect", timed("evaluate", Judge.detect)),
        (pipeline, "write_result", timed("save", pipeline.write_result)),
        (pipeline.Reader, "load", lambda *args, **options: reader),
        (quantizer, "save_int8", timed("save", quantizer.save_int8)),
        (int8_snapshots, "save_int8", timed("save", int8_snapshots.save_int8)),
    )
    for target, name, replacement in patches:
        patch = mock.patch.object(target, name, replacement)
        patch.start()
    with static_mode():
        record = pipeline.compress(config, work / "int8", device="CPU", progress=False).record
    training = record["training"]
    row = _row(training["loss"], [entry["agreement"] for entry in training["evaluations"]], work / "int8")
    return {**row, "fp32_map": record["fp32"]["map"]}


def _row(losses: Sequence[float], metrics: Sequence[float], directory: Path) -> dict[str, Any]:
    return {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]] if losses else [],
        "evaluations": list(metrics),
        "bytes": sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".pdmodel", ".pdiparams")),
    }
