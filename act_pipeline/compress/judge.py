"""The engine that a compression judges by: the one that this machine deploys INT8 with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.float_evaluation import cached_evaluation
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.reader_settings import ReaderSettings
from act_pipeline.engines import Engine, Machine, create_engine, fastest_engine, find_support, machine
from act_pipeline.evaluation import Evaluation, evaluate_beside
from act_pipeline.evaluation.batches import Latencies, NotFinite, measure_in_turns
from act_pipeline.graph.deformable_attention import samples_by_rows
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
REFERENCE = "int8_reference"
# Each takes the memory of an inference, about 1 GB for RT-DETR at 640.
_MOST_ENGINES = 4
_TIMED_IMAGES = 4
# Of each model, in turns: some 4 s for RT-DETR-R18 at 640 on two cores.
_TIMED_ROUNDS = 10


@dataclass(frozen=True)
class Judge:
    """Which engine evaluates the float model and the INT8 ones.

    Attributes:
        engine: of the INT8 models, a name of :data:`act_pipeline.engines.ENGINES`.
        fp32_engine: of the float model: the same one, but where that has no float.
        device: ``CPU`` or ``GPU``, where both run.
        why: why this one, in one line.
    """

    engine: str
    fp32_engine: str
    device: str
    why: str

    @property
    def is_reference(self) -> bool:
        """Whether it is the engine that nobody deploys."""
        return self.engine == REFERENCE

    def name(self, precision: str) -> str:
        """Return the engine of a precision, ``fp32`` or ``int8``."""
        return self.fp32_engine if precision == "fp32" else self.engine

    @property
    def parallel(self) -> tuple[int, int]:
        """How many engines an evaluation runs side by side, and the CPU threads of each.

        Many ops of Paddle's CPU kernels use one core whatever they are given; other runtimes gain nothing by it.
        """
        cpus = available_cpus()
        count = min(cpus, _MOST_ENGINES) if self.is_reference and self.device == "CPU" else 1
        return count, cpus // count

    def load(self, model: InferenceModel, precision: str, reader: Reader, threads: int | None = None) -> Engine:
        """Load a model; for TensorRT in Paddle the shapes are collected first.

        Raises:
            UserError: the engine refuses the model.
        """
        name = self.name(precision)
        if name == "paddle_trt":
            collect_shapes(model, reader, self.device)
        return create_engine(name, model, precision, self.device, threads)

    def evaluate(
        self, model: InferenceModel, precision: str, reader: Reader, progress: bool, limit: int | None = None
    ) -> Evaluation:
        """Evaluate a model on the eval split.

        Args:
            model: the model.
            precision: ``fp32`` or ``int8``.
            reader: the data.
            progress: show a progress bar.
            limit: the first so many images only.
        """
        count, threads = self.parallel
        with contextlib.ExitStack() as stack:
            engine: Any = self.load(model, precision, reader, threads)
            stack.enter_context(contextlib.closing(engine))
            engines = [engine]
            for _ in range(count - 1):
                engines.append(stack.enter_context(contextlib.closing(engine.clone())))
            return evaluate_beside(engines, reader, progress=progress, limit=limit)

    def evaluate_float(self, model: InferenceModel, reader: Reader, progress: bool) -> tuple[Evaluation, bool]:
        """Evaluate the float model, unless the user's cache holds that; say whether it did."""
        return cached_evaluation(
            model.content_hash(),
            reader.fingerprint("eval"),
            self.fp32_engine,
            self.device,
            self.parallel[1],
            lambda: self.evaluate(model, "fp32", reader, progress),
        )

    def survives_nan(self, graph: StaticGraph) -> bool:
        """Say whether :meth:`evaluate` comes back from an INT8 graph whatever its numbers are.

        Paddle 2.6.2's ``grid_sampler`` on the CPU reads beyond its input where a grid is NaN, and ends the process; the
        reference has none where it knows the attention. Of other runtimes nothing is known.
        """
        return self.is_reference and samples_by_rows(parsed(graph.program.desc.serialize_to_string()))

    def detect(
        self, model: InferenceModel, precision: str, reader: Reader, feeds: Sequence[Mapping[str, np.ndarray]]
    ) -> np.ndarray:
        """Return what a model detects on batches, [M, 7] as ``Evaluation.detections``.

        An image's id is its place in ``feeds``, a category's the class index.

        Raises:
            NotFinite: a box or a score is NaN or infinite.
        """
        rows, image = [], 0
        with contextlib.closing(self.load(model, precision, reader)) as engine:
            for feed in feeds:
                outputs = engine.run(feed)
                counts = np.asarray(outputs["bbox_num"]).reshape(-1)
                bbox = np.asarray(outputs["bbox"], np.float64).reshape(-1, 6)
                if not np.isfinite(bbox).all():
                    raise NotFinite("the model's boxes are not finite (NaN or infinite) on a training image")
                ids = np.repeat(image + np.arange(len(counts)), counts)
                rows.append(np.column_stack([ids, bbox[:, 2:4], bbox[:, 4:] - bbox[:, 2:4], bbox[:, 1], bbox[:, 0]]))
                image += len(counts)
        found = np.concatenate(rows) if rows else np.zeros((0, 7))
        return found[found[:, 6] >= 0]  # a class of -1 marks a row that is no detection

    def latencies(
        self, models: Mapping[str, tuple[InferenceModel, str]], reader: Reader
    ) -> tuple[dict[str, Latencies], int]:
        """Time models in turns on the first images of the eval split, one image a run, all CPUs, nothing else running.

        Args:
            models: label -> model and precision.
            reader: the data.

        Returns:
            label -> its latencies, and how many rounds there were.
        """
        batches = list(_first(reader.loader("eval", batch_size=1, shuffle=False), _TIMED_IMAGES))
        with contextlib.ExitStack() as stack:
            engines = {
                label: stack.enter_context(contextlib.closing(self.load(model, precision, reader)))
                for label, (model, precision) in models.items()
            }
            return measure_in_turns(engines, batches, _TIMED_ROUNDS), _TIMED_ROUNDS


def choose_judge(asked: str, device: str, model: InferenceModel, here: Machine | None = None) -> Judge:
    """Return the engine that a config asks for.

    Args:
        asked: ``Strategy.engine``: a name, or ``auto``: what ``infer_eval --engine=auto`` takes here for INT8; where it
            does not take the model, the reference.
        device: ``CPU`` or ``GPU``, where the compression computes.
        model: the float model.
        here: this machine, or a stand-in.

    Raises:
        UserError: this machine cannot run the engine.
    """
    here = here or machine()
    if asked == "auto":
        name, found, why = fastest_engine("int8", "auto" if device == "GPU" else "CPU", here)
        refusal = _refusal(name, model) if name != REFERENCE else None
        if refusal is None:
            return _judge(name, found, why, here)
        _logger.warning("judging in %s: %s does not take the model: %s", REFERENCE, name, refusal)
        return _judge(REFERENCE, "CPU", f"{name} does not take the model", here)
    devices = [entry for entry in ("GPU", "CPU") if _available(asked, entry, here)]
    if not devices:  # says what is missing
        find_support(asked, "int8", "GPU" if asked in ("paddle_trt", "tensorrt") else "CPU", here).require()
    return _judge(asked, device if device in devices else devices[0], "Strategy.engine names it", here)


def _judge(name: str, device: str, why: str, here: Machine) -> Judge:
    fp32 = name
    if name == REFERENCE:
        fp32 = "paddle_onednn" if find_support("paddle_onednn", "fp32", "CPU", here).available else "paddle"
    return Judge(name, fp32, device, why)


def _available(name: str, device: str, here: Machine) -> bool:
    try:
        return find_support(name, "int8", device, here).available
    except UserError:  # it has no such device
        return False


def _refusal(name: str, model: InferenceModel) -> Optional[str]:
    """Return why an engine cannot take a model, as far as that can be told without loading it."""
    from act_pipeline.engines.registry import find_runtime
    from act_pipeline.onnx_export import lowered_onnx

    if not find_runtime(name).onnx:
        return None
    try:
        lowered_onnx(model, "cpu")
    except UserError as error:
        return str(error)
    return None


def collect_shapes(model: InferenceModel, reader: Reader, device: str) -> None:
    """Collect ``dynamic_shape.txt`` for TensorRT in Paddle in a process of its own, unless it is there and valid.

    Paddle 2.6.2 cannot build TensorRT's engines in the process that collected.

    Raises:
        UserError: it could not be collected.
    """
    process = get_context("spawn").Process(target=_collect_shapes, args=(model, reader.settings, device))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise UserError(
            f"the shapes of {model.directory} could not be collected for paddle_trt; run deploy/infer_eval.py "
            f"--collect_shape_only=True --model_path={model.directory}, which says why"
        )


def _collect_shapes(model: InferenceModel, settings: ReaderSettings, device: str) -> None:
    from act_pipeline.inference import InferenceRequest, run_inference

    request = InferenceRequest(
        str(model.directory), model.model_filename, model.params_filename, device=device, collect_shape_only=True
    )
    run_inference(request, say=_logger.info, reader=Reader(settings))


def _first(batches: Iterable[Any], count: int) -> Iterable[Any]:
    for _, batch in zip(range(count), batches):
        yield batch
