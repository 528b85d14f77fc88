"""Run an engine on batches: convert its detections to COCO's form and measure its latency."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Optional, Protocol

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.thread_pool import map_prefetched
from act_pipeline.engines.interface import Engine
from act_pipeline.evaluation.detection_rows import rows_of_outputs

PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}


class NotFinite(UserError):
    """The boxes contain NaN or infinity."""


class Detector(Protocol):
    """What is needed of an engine to evaluate it; see :class:`act_pipeline.engines.interface.Engine`."""

    device: str
    threads: int

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Detect objects in a batch."""


@dataclass(frozen=True)
class BatchRun:
    """The result of one batch.

    Attributes:
        image_ids: COCO ids of the batch's images, in order.
        detections: float64 [K, 7]: index of the image in ``image_ids``, x, y, width, height (pixels of the original
            image), score, category id.
        seconds: duration of ``engine.run``.
        masks: mask of each detection, COCO's run lengths; None: the model gives none.
    """

    image_ids: tuple[int, ...]
    detections: np.ndarray
    seconds: float
    masks: Optional[list[Any]] = None


def run_batches(
    engine: Detector,
    batches: Iterable[Mapping[str, np.ndarray]],
    category_ids: Sequence[int],
    annotation_file: Any,
    warmup: int = 1,
) -> Iterator[BatchRun]:
    """Run batches through an engine, in this process or in a worker process.

    Args:
        engine: the engine under evaluation.
        batches: dicts of the engine's inputs and ``im_id`` int64 [N].
        category_ids: the COCO category id of every class index.
        annotation_file: path of the annotation file, for messages.
        warmup: untimed runs of the first batch.

    Yields:
        one result per batch, in order.

    Raises:
        NotFinite: the boxes contain NaN or infinity.
        UserError: the box counts do not fit the batch, or the model has more classes than the annotations.
    """
    for batch in batches:
        for _ in range(warmup):
            engine.run(batch)
        warmup = 0
        start = time.perf_counter()
        outputs = engine.run(batch)
        seconds = time.perf_counter() - start
        ids = tuple(int(image_id) for image_id in np.asarray(batch["im_id"]).reshape(-1))
        rows = _coco_rows(outputs, ids, category_ids, annotation_file)
        yield BatchRun(ids, rows, seconds, list(outputs["masks"]) if "masks" in outputs else None)


def run_in_parallel(
    engines: Sequence[Engine],
    batches: Iterable[Mapping[str, np.ndarray]],
    category_ids: Sequence[int],
    annotation_file: Any,
) -> Iterator[BatchRun]:
    """Run batches as :func:`run_batches` does, each on the next free engine.

    Args:
        engines: engines of the same model, one per thread of this process. Several engines with one CPU thread each
            have a higher throughput than one engine with as many threads, because many ops of a detector are
            single-threaded.
        batches, category_ids, annotation_file: see :func:`run_batches`.

    Yields:
        one result per batch, in the order of the batches.
    """
    free: SimpleQueue[Engine] = SimpleQueue()
    for engine in engines:
        free.put(engine)

    def run(batch: Mapping[str, np.ndarray]) -> BatchRun:
        engine = free.get()
        try:
            (found,) = run_batches(engine, [batch], category_ids, annotation_file, warmup=0)
            return found
        finally:
            free.put(engine)

    yield from map_prefetched(run, batches, len(engines), len(engines) + 1, "engine")


def measure_latency(
    engine: Engine, batches: Sequence[Mapping[str, np.ndarray]], warmup: int = 5, repeats: int = 50
) -> tuple[dict[str, float], float]:
    """Measure an engine's latency on batches that are already in memory.

    Args:
        engine: the engine to measure.
        batches: the engine's inputs, all of one batch size; used cyclically.
        warmup: number of untimed runs.
        repeats: number of timed runs.

    Returns:
        percentiles (``min``, ``p50``, ``p90``, ``p99``, ``max``) and ``mean`` in milliseconds per batch, and images per
        second.
    """
    turns = itertools.cycle(batches)
    for _ in range(warmup):
        engine.run(next(turns))
    seconds, images = [], 0
    for _ in range(repeats):
        batch = next(turns)
        start = time.perf_counter()
        engine.run(batch)
        seconds.append(time.perf_counter() - start)
        images += len(batch["image"])
    return mean_and_percentiles(seconds), images / max(sum(seconds), 1e-9)


@dataclass(frozen=True)
class Latencies:
    """Latency of an engine on one batch.

    Attributes:
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` in milliseconds per batch.
        ratio: speed-up over the first engine, the median over the rounds of latency(first) / latency(this); 1.0 for the
            first.
    """

    latency_ms: dict[str, float]
    ratio: float


def measure_in_turns(
    engines: Mapping[str, Engine], batches: Sequence[Mapping[str, np.ndarray]], rounds: int, warmup: int = 2
) -> dict[str, Latencies]:
    """Measure several engines in interleaved rounds, in each of which every engine runs the same batch once.

    Args:
        engines: label -> engine; ratios are relative to the first one.
        batches: the engines' inputs; used cyclically.
        rounds: number of timed rounds.
        warmup: number of untimed rounds before them.

    Returns:
        label -> latencies.
    """
    turns = itertools.cycle(batches)
    seconds: dict[str, list[float]] = {label: [] for label in engines}
    for number in range(warmup + rounds):
        batch = next(turns)
        for label, engine in engines.items():
            start = time.perf_counter()
            engine.run(batch)
            if number >= warmup:
                seconds[label].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    return {
        label: Latencies(latency_percentiles(taken), round(float(np.median(first / np.array(taken))), 4))
        for label, taken in seconds.items()
    }


def latency_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return ``min``, ``p50``, ``p90``, ``p99`` and ``max`` of durations given in seconds, in milliseconds."""
    return {name: round(float(np.percentile(seconds, at)) * 1000, 4) for name, at in PERCENTILES.items()}


def mean_and_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return :func:`latency_percentiles` and ``mean`` of durations given in seconds, in milliseconds."""
    return {**latency_percentiles(seconds), "mean": round(float(np.mean(seconds)) * 1000, 4)}


def _coco_rows(
    outputs: Mapping[str, np.ndarray], image_ids: Sequence[int], category_ids: Sequence[int], annotation_file: Any
) -> np.ndarray:
    """Convert the outputs of one batch to ``BatchRun.detections``."""
    bbox = np.asarray(outputs["bbox"], np.float64).reshape(-1, 6)
    bbox_num = np.asarray(outputs["bbox_num"]).reshape(-1)
    if len(bbox_num) != len(image_ids) or bbox_num.sum() != len(bbox):
        raise UserError(
            f"the model gave bbox {list(bbox.shape)} and bbox_num {bbox_num.tolist()} for {len(image_ids)} images, "
            "expected one count an image that add up to the boxes; export the model again with tools/export_model.py"
        )
    places = np.repeat(np.arange(len(image_ids)), bbox_num)
    if not np.isfinite(bbox).all():
        bad = image_ids[places[~np.isfinite(bbox).all(axis=1)][0]]
        raise NotFinite(
            f"the model's boxes are not finite (NaN or infinite) on image id {bad}; its weights are damaged"
        )
    found = bbox[:, 0] >= 0  # a class of -1 marks a row that is no detection
    bbox, places = bbox[found], places[found]
    classes = bbox[:, 0].astype(np.int64)
    if len(classes) and classes.max() >= len(category_ids):
        raise UserError(
            f"the model found class {classes.max()}, but {annotation_file} has {len(category_ids)} categories; "
            "expected the data set that the model was trained on: give its --reader_config; or, if the boxes are "
            "decoded outside of the model's graph, correct arch in its infer_cfg.yml"
        )
    categories = np.asarray(category_ids, np.float64)[classes]
    return rows_of_outputs(bbox, places, categories)
