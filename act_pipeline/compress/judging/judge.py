"""Evaluate the models of a compression in an engine, see `compress.judging.choice` for which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np

from act_pipeline.compress.judging.float_evaluation import cached_evaluation
from act_pipeline.compress.judging.tensorrt_shapes import collect_shapes
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.data import Reader
from act_pipeline.engines import Engine, create_engine
from act_pipeline.engines.registry import find_runtime
from act_pipeline.evaluation import Evaluation, evaluate_in_parallel
from act_pipeline.evaluation.batches import Latencies, NotFinite, measure_in_turns
from act_pipeline.evaluation.detection_rows import rows_of_outputs
from act_pipeline.families.interface import PROMPTS
from act_pipeline.families.registry import Decoder
from act_pipeline.graph.deformable_attention import samples_by_rows
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.static_graph import StaticGraph

REFERENCE = "int8_reference"
# Engines of the reference that run in parallel. Each takes about 1 GB of memory for RT-DETR at 640.
_MOST_ENGINES = 4
_TIMED_IMAGES = 4
# Rounds of each model, in turns: about 4 s for RT-DETR-R18 at 640 on two cores.
_TIMED_ROUNDS = 10


class Detected(NamedTuple):
    """Detections on feeds.

    Attributes:
        rows: float64 [M, 7] as ``Evaluation.detections``: position of the image in the feeds, x, y, width and height in
            pixels, score, category id.
        masks: mask of each row, COCO's run lengths; None: the model gives none.
    """

    rows: np.ndarray
    masks: Optional[list[Any]] = None

    def first(self, images: int) -> Detected:
        """Return the detections on the first images."""
        taken = self.rows[:, 0] < images
        return Detected(self.rows[taken], self.masks and [mask for mask, take in zip(self.masks, taken) if take])

    def followed_by(self, others: Detected, images: int) -> Detected:
        """Return these detections, on the first ``images`` images, and others on the images after them."""
        rows = others.rows.copy()
        rows[:, 0] += images
        masks = None if self.masks is None or others.masks is None else [*self.masks, *others.masks]
        return Detected(np.concatenate([self.rows, rows]), masks)


@dataclass(frozen=True)
class Judge:
    """The engines that evaluate the float model and the INT8 models.

    Attributes:
        engine: engine of the INT8 models, a name of :data:`act_pipeline.engines.ENGINES`.
        fp32_engine: engine of the float model: the same, except for ``int8_reference``, which does not run float
            models.
        device: ``CPU`` or ``GPU``, where both run.
        why: the reason for the choice, in one line.
        decoder: turns the outputs of all of them into detections; None: each model's own.
        rest_in_bf16: whether the float model's description has OpenVINO compute in bf16 what is not INT8. The models
            that strategies write have no description.
    """

    engine: str
    fp32_engine: str
    device: str
    why: str
    decoder: Optional[Decoder] = None
    rest_in_bf16: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether the engine is ``int8_reference``, which is not used in deployment."""
        return self.engine == REFERENCE

    @property
    def has_zero_points(self) -> bool:
        """Whether the engine rounds activations with zero points (`onnx_export.rewrites.zero_points`)."""
        return self.device == "CPU" and find_runtime(self.engine).onnx

    def name(self, precision: str) -> str:
        """Return the name of the engine for a precision, ``fp32`` or ``int8``."""
        return self.fp32_engine if precision == "fp32" else self.engine

    @property
    def parallel(self) -> tuple[int, int]:
        """The number of engines that an evaluation runs in parallel, and the CPU threads of each.

        The reference runs several, since many of Paddle's CPU kernels use one core only. Other runtimes would gain
        nothing by it.
        """
        cpus = available_cpus()
        count = min(cpus, _MOST_ENGINES) if self.is_reference and self.device == "CPU" else 1
        return count, cpus // count

    def load(self, model: InferenceModel, precision: str, reader: Reader, threads: int | None = None) -> Engine:
        """Load a model into its engine; for TensorRT in Paddle, collect the shapes first.

        Args:
            model: the model.
            precision: ``fp32`` or ``int8``.
            reader: the data that shapes are collected on.
            threads: CPU threads; None: the engine's default.

        Raises:
            UserError: the engine refuses the model, or the shapes could not be collected.
        """
        name = self.name(precision)
        if find_runtime(name).shapes:
            collect_shapes(model, reader, self.device)
        options = {"float_precision": "bf16"} if self.rest_in_bf16 and precision == "int8" else {}
        return create_engine(name, model, precision, self.device, threads, decoder=self.decoder, **options)

    def evaluate(
        self,
        model: InferenceModel,
        precision: str,
        reader: Reader,
        progress: bool,
        limit: int | None = None,
        before: Evaluation | None = None,
    ) -> Evaluation:
        """Evaluate a model on the eval split.

        Args:
            model: the model.
            precision: ``fp32`` or ``int8``.
            reader: the data.
            progress: show a progress bar on stderr.
            limit: evaluate only this number of images, from the first on; None: all.
            before: an evaluation of the same model on the first images, which are not run again.
        """
        count, threads = self.parallel
        with contextlib.ExitStack() as stack:
            engine: Any = self.load(model, precision, reader, threads)
            stack.enter_context(contextlib.closing(engine))
            engines = [engine]
            for _ in range(count - 1):
                engines.append(stack.enter_context(contextlib.closing(engine.clone())))
            return evaluate_in_parallel(engines, reader, progress=progress, limit=limit, before=before)

    def evaluate_float(
        self, model: InferenceModel, reader: Reader, progress: bool, before: Evaluation | None = None
    ) -> tuple[Evaluation, bool]:
        """Evaluate the float model on the eval split, or read its evaluation from the user's cache.

        Args:
            model: the float model.
            reader: the data.
            progress: show a progress bar on stderr.
            before: see :meth:`evaluate`.

        Returns:
            The evaluation, and whether it comes from the cache.
        """
        return cached_evaluation(
            model.content_hash() + (self.decoder.key if self.decoder else ""),
            reader.fingerprint("eval"),
            self.fp32_engine,
            self.device,
            self.parallel[1],
            lambda: self.evaluate(model, "fp32", reader, progress, before=before),
        )

    def survives_nan(self, graph: StaticGraph) -> bool:
        """Return whether :meth:`evaluate` is safe for an INT8 graph that computes NaN.

        Paddle 2.6.2's ``grid_sampler`` on the CPU reads outside its input where a grid value is NaN, and the process
        crashes. The reference replaces ``grid_sampler`` if it recognizes the graph's deformable attention. Other
        runtimes have not been tested and count as unsafe.
        """
        return self.is_reference and samples_by_rows(parsed(graph.program.desc.serialize_to_string()))

    def detect(
        self, model: InferenceModel, precision: str, reader: Reader, feeds: Sequence[Mapping[str, np.ndarray]]
    ) -> Detected:
        """Return the detections of a model on batches.

        Args:
            model: the model.
            precision: ``fp32`` or ``int8``.
            reader: the data that TensorRT's shapes are collected on.
            feeds: the model's inputs by name, in batches.

        Returns:
            The detections; category ids are the class indices.

        Raises:
            NotFinite: a box or a score is NaN or infinite.
            UserError: see :meth:`load`.
        """
        with contextlib.closing(self.load(model, precision, reader)) as engine:
            return detections(engine, feeds)

    def latencies(
        self, models: Mapping[str, tuple[InferenceModel, str]], reader: Reader
    ) -> tuple[dict[str, Latencies], int]:
        """Measure latencies of models in turns on the first images of the eval split, with batch size 1 and all CPUs.

        Of a pair of models only the compressed one is timed: without prompts, the other one does not run.

        Args:
            models: label -> model and precision.
            reader: the data.

        Returns:
            Label -> latencies, and the number of rounds.
        """
        batches = list(_first(reader.loader("eval", batch_size=1, shuffle=False), _TIMED_IMAGES))
        batches = [{name: array for name, array in batch.items() if name != PROMPTS} for batch in batches]
        with contextlib.ExitStack() as stack:
            engines = {
                label: stack.enter_context(contextlib.closing(self.load(model, precision, reader)))
                for label, (model, precision) in models.items()
            }
            return measure_in_turns(engines, batches, _TIMED_ROUNDS), _TIMED_ROUNDS


def detections(engine: Engine, feeds: Sequence[Mapping[str, np.ndarray]]) -> Detected:
    """Return the detections of a loaded model on batches; see :meth:`Judge.detect`."""
    rows: list[np.ndarray] = []
    masks: list[Any] = []
    has_masks, image = False, 0
    for feed in feeds:
        outputs = engine.run(feed)
        counts = np.asarray(outputs["bbox_num"]).reshape(-1)
        bbox = np.asarray(outputs["bbox"], np.float64).reshape(-1, 6)
        if not np.isfinite(bbox).all():
            raise NotFinite("the model's boxes are not finite (NaN or infinite) on a training image")
        ids = np.repeat(image + np.arange(len(counts)), counts)
        rows.append(rows_of_outputs(bbox, ids))
        has_masks = "masks" in outputs
        masks.extend(outputs.get("masks", ()))
        image += len(counts)
    found = np.concatenate(rows) if rows else np.zeros((0, 7))
    if has_masks:
        return Detected(found, masks)
    return Detected(found[found[:, 6] >= 0])  # class -1 marks padding rows


def _first(batches: Iterable[Any], count: int) -> Iterable[Any]:
    for _, batch in zip(range(count), batches):
        yield batch
