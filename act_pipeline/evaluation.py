"""COCO scores, latency and throughput of an engine on a data set."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from act_pipeline.data.annotations import Annotations, distinct_names
from act_pipeline.engines.base import Artifact, Engine, available_cpus, location
from act_pipeline.errors import UserError
from act_pipeline.records import write_bytes_atomically, write_record, write_text_atomically
from act_pipeline.running import BatchRun, latency_percentiles, run_batches, run_beside

EVAL_SCHEMA = "act_pipeline.eval/1"
DETECTIONS_FILENAME = "detections.npz"
# COCO's scores look no further.
KEPT_DETECTIONS = 100
# Some 90,000 images of 100 float32 rows, twice: a small file that unpacks to more is none of ours.
MAX_DETECTION_BYTES = 512 << 20
STAT_NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


class EvaluationReader(Protocol):
    """What is needed of a reader (:class:`act_pipeline.data.Reader` has it)."""

    def annotation_file(self, split: str) -> Any:
        """Return the path of the COCO annotation file of ``split``."""

    def loader(self, split: str, batch_size: int | None = None, **options: Any) -> Iterable[Mapping[str, np.ndarray]]:
        """Return batches: the engine's inputs and ``im_id [N]`` int64."""


@dataclass
class Evaluation:
    """What a model does on a data set.

    Attributes:
        map: mean average precision at IoU 0.50:0.95, all areas, at most 100 detections an image; in [0, 1], -1 if the
            images have no ground truth.
        map50: the same at IoU 0.50.
        stats: the twelve COCO figures by the names in ``STAT_NAMES``; -1 where there is no ground truth (of that size).
        summary: the standard twelve lines that pycocotools prints.
        per_class: class name -> AP at 0.50:0.95; None for a class without ground truth.
        images: how many were evaluated.
        batch_size: images in a timed run.
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` of ``engine.run`` on a whole batch, copies in and out of
            the runtime included, reading and preprocessing not; None: no engine ran alone.
        images_per_second: images / the sum of those times.
        detections: [M, 7] float64: image id, x, y, width, height (pixels of the original image), score, category id.
    """

    map: float
    map50: float
    stats: dict[str, float]
    summary: list[str]
    per_class: dict[str, float | None]
    images: int
    batch_size: int
    latency_ms: dict[str, float] | None
    images_per_second: float
    detections: np.ndarray = field(repr=False)

    def as_record(
        self, engine: Engine, model: Artifact | None = None, reader: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return the content of ``eval.json``; ``more`` is added as it is."""
        return {
            **engine_record(engine, model, reader),
            "images": self.images,
            "map": self.map,
            "map50": self.map50,
            "latency_ms": self.latency_ms,
            "images_per_second": self.images_per_second,
            "batch_size": self.batch_size,
            "stats": self.stats,
            "per_class": self.per_class,
            **more,
        }

    def write_record(
        self,
        path: str | os.PathLike[str],
        engine: Engine,
        model: Artifact | None = None,
        reader: Any = None,
        **more: Any,
    ) -> None:
        """Write ``eval.json`` (schema ``act_pipeline.eval/1``)."""
        write_record(path, EVAL_SCHEMA, self.as_record(engine, model, reader, **more))

    def write_detections(self, path: str | os.PathLike[str]) -> None:
        """Write the detections in COCO's result form, as its evaluation servers take them."""
        rows = [
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "bbox": [round(float(value), 3) for value in box],
                "score": round(float(score), 6),
            }
            for image_id, *box, score, category_id in self.detections.tolist()
        ]
        write_text_atomically(path, json.dumps(rows) + "\n")


def save_detections(path: str | os.PathLike[str], evaluations: Mapping[str, Evaluation]) -> None:
    """Write the best 100 detections an image of several evaluations as NumPy's ``.npz``, which they can be scored from.

    Args:
        path: the file; by its users named ``detections.npz`` and kept beside the INT8 model.
        evaluations: name (``fp32``, ``int8``) -> evaluation; each becomes an array [M, 7] as ``Evaluation.detections``,
            float32, or float64 where an image id has more than float32's 24 bits.
    """
    arrays = {}
    for name, evaluation in evaluations.items():
        rows = best_detections(evaluation.detections)
        narrow = rows.astype(np.float32)
        exact = bool((narrow[:, [0, 6]] == rows[:, [0, 6]]).all())
        # By columns: equal ids stand beside each other then, and the file is a third smaller.
        arrays[name] = np.asfortranarray(narrow if exact else rows)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomically(path, buffer.getvalue())


def load_detections(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read what :func:`save_detections` wrote: name -> [M, 7] float64 as ``Evaluation.detections``.

    Raises:
        UserError: the file is missing, is damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_DETECTION_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, expected at most {MAX_DETECTION_BYTES}")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: np.ascontiguousarray(content[name], np.float64) for name in content.files}
    except FileNotFoundError:
        raise UserError(f"{path} is missing, expected the detections of an evaluation; compress again") from None
    except Exception as error:  # zipfile, its decompressors and NumPy's header reader raise whatever comes up
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} holds no detections ({reason}); delete it and compress again") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != 7 or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {list(array.shape)}, expected finite rows of 7: image id, x, y, width, height, "
                "score, category id; delete it and compress again"
            )
    return arrays


def best_detections(detections: np.ndarray, count: int = KEPT_DETECTIONS) -> np.ndarray:
    """Return the ``count`` rows of each image with the highest scores, image by image, the surest first."""
    order = np.lexsort((-detections[:, 5], detections[:, 0]))
    ranked = detections[order]
    _, starts, sizes = np.unique(ranked[:, 0], return_index=True, return_counts=True)
    rank = np.arange(len(ranked)) - np.repeat(starts, sizes)
    return ranked[rank < count]


def engine_record(engine: Engine, model: Artifact | None = None, reader: Any = None) -> dict[str, Any]:
    """Return who ran what on what: the part of ``eval.json`` that is no measurement.

    ``model`` is what was asked for, the folder of a model that was lowered; ``model_bytes`` and ``model_hash`` are of
    the ``artifact`` that the engine loaded.
    """
    artifact = getattr(engine, "artifact", None) or model
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "threads": engine.threads,
        **({"engine_settings": dict(engine.settings)} if hasattr(engine, "settings") else {}),
        "model_bytes": artifact.bytes if artifact else None,
        "model_hash": artifact.content_hash() if artifact else None,
        "model": str(location(model or artifact)) if artifact else None,
        "artifact": str(location(artifact)) if artifact else None,
        "reader": str(reader.path) if getattr(reader, "path", None) else None,
        "reader_hash": _data_hash(reader),
        "versions": engine.versions(),
    }


def _data_hash(reader: Any) -> str | None:
    """Return the hash of the data; None where they are not here, to show a picture or to measure speed."""
    with contextlib.suppress(UserError, AttributeError):
        return reader.fingerprint()
    return None


def evaluate(
    engine: Engine,
    reader: EvaluationReader,
    split: str = "eval",
    limit: int | None = None,
    progress: bool = True,
    batch_size: int = 1,
    warmup: int = 1,
) -> Evaluation:
    """Run every image of a split through an engine and score what it finds.

    Args:
        engine: anything that is an :class:`act_pipeline.engines.base.Engine`; it is not closed.
        reader: gives the batches and the annotation file.
        split: ``eval`` or ``train``, as the reader has them.
        limit: the first so many images only; the scores are of these.
        progress: show a progress bar on stderr.
        batch_size: images in a run.
        warmup: runs of the first batch that are not timed.

    Raises:
        UserError: no image could be read, the model's classes do not fit the annotations, or its outputs are not
            finite.
    """
    # Reading ahead on the cores that the engine computes on would be timed with it.
    alone = engine.device == "CPU" and engine.threads >= available_cpus()
    workers = 0 if alone else None
    loader = reader.loader(split, batch_size=batch_size, shuffle=False, drop_last=False, workers=workers)
    truth = GroundTruth.load(reader, split)
    batches = _batches(loader, limit, batch_size, progress)
    return score(list(run_batches(engine, batches, truth.category_ids, truth.path, warmup)), truth, batch_size)


def evaluate_beside(
    engines: Sequence[Engine], reader: EvaluationReader, split: str = "eval", progress: bool = True
) -> Evaluation:
    """Evaluate as :func:`evaluate` does, as soon as the machine can: for scores, not for latencies.

    Images are read while others are computed, and each goes to whichever engine is free.

    Args:
        engines: of one model, see :func:`act_pipeline.running.run_beside`; they are not closed.
        reader, split, progress: see :func:`evaluate`.

    Returns:
        an evaluation whose ``latency_ms`` is None if there are several engines, and whose ``images_per_second`` is
        images / the time from the first image to the last.

    Raises:
        UserError: as :func:`evaluate`.
    """
    loader = reader.loader(split, batch_size=1, shuffle=False, drop_last=False)
    truth = GroundTruth.load(reader, split)
    start = time.perf_counter()
    runs = list(run_beside(engines, _batches(loader, None, 1, progress), truth.category_ids, truth.path))
    seconds = time.perf_counter() - start
    found = score(runs, truth, 1)
    latency_ms = None if len(engines) > 1 else found.latency_ms
    return replace(found, latency_ms=latency_ms, images_per_second=found.images / max(seconds, 1e-9))


@dataclass(frozen=True)
class GroundTruth:
    """What detections are scored against.

    Attributes:
        path: the annotation file.
        coco: pycocotools' ``COCO`` of it.
        category_ids: by class index: the reader's ``class_ids``, or the file's order.
    """

    path: Any
    coco: Any
    category_ids: list[int]

    @classmethod
    def load(cls, reader: EvaluationReader, split: str) -> GroundTruth:
        """Read a split's annotation file; raises a UserError where it is missing or not in COCO's form."""
        path = reader.annotation_file(split)
        annotations = Annotations.load(path, f"the reader's {split} split")
        class_ids = getattr(reader, "class_ids", None)
        return cls(path, annotations.ground_truth(), class_ids(annotations) if class_ids else annotations.category_ids)


def score(runs: Sequence[BatchRun], truth: GroundTruth, batch_size: int) -> Evaluation:
    """Score what was found in all batches, wherever they were run.

    Args:
        runs: in the order of the images.
        truth: of these images, and maybe more.
        batch_size: of whole batches; latencies are of these alone, if there are any.

    Raises:
        UserError: there are no images.
    """
    image_ids = [image_id for run in runs for image_id in run.image_ids]
    if not image_ids:
        raise UserError(f"{truth.path}: no image could be evaluated, expected at least one")
    detections = np.concatenate([run.detections for run in runs])
    stats, summary, precision = _score(truth.coco, detections, sorted(set(image_ids)))
    category_ids = truth.coco.getCatIds()
    names = distinct_names([str(category["name"]) for category in truth.coco.loadCats(category_ids)], category_ids)
    name_of = dict(zip(category_ids, names))
    seconds = [run.seconds for run in runs]
    whole = [run.seconds for run in runs if len(run.image_ids) == batch_size] or seconds
    return Evaluation(
        map=stats["ap"],
        map50=stats["ap50"],
        stats=stats,
        summary=summary,
        per_class={
            name_of[category_id]: ap
            for category_id, ap in zip(sorted(category_ids), precision) if category_id in truth.category_ids
        },
        images=len(image_ids),
        batch_size=batch_size,
        latency_ms=latency_percentiles(whole),
        images_per_second=len(image_ids) / max(sum(seconds), 1e-9),
        detections=detections,
    )


def _batches(
    loader: Iterable[Mapping[str, np.ndarray]], limit: int | None, batch_size: int, progress: bool
) -> Iterator[Mapping[str, np.ndarray]]:
    from tqdm import tqdm

    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    if limit is not None:
        wanted = -(-limit // batch_size)
        total = wanted if total is None else min(total, wanted)
    left = limit
    with tqdm(total=total, desc="evaluate", unit="batch", disable=not progress, leave=False) as bar:
        for batch in loader:
            if left is not None:
                if left <= 0:
                    break
                batch = {name: array[:left] for name, array in batch.items()}
                left -= len(batch["im_id"])
            yield batch
            bar.update()
            if left == 0:  # asked for no more: do not make the loader read another batch
                break


def _score(
    coco: Any, detections: np.ndarray, image_ids: Sequence[int]
) -> tuple[dict[str, float], list[str], list[float | None]]:
    """Return the twelve figures, the lines, and AP at 0.50:0.95 by category id in ascending order."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        if len(detections):
            results = coco.loadRes(detections)
        else:  # loadRes fails on nothing at all
            results = COCO()
            results.dataset = {
                "images": coco.dataset["images"],
                "categories": coco.dataset["categories"],
                "annotations": [],
            }
            results.createIndex()
        scorer = COCOeval(coco, results, "bbox")
        scorer.params.imgIds = list(image_ids)
        scorer.evaluate()
        scorer.accumulate()
        with contextlib.redirect_stdout(printed):
            scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    per_class: list[float | None] = []
    for index in range(precision.shape[2]):
        valid = precision[:, :, index][precision[:, :, index] > -1]
        per_class.append(float(valid.mean()) if valid.size else None)
    stats = {name: float(value) for name, value in zip(STAT_NAMES, scorer.stats)}
    return stats, [line.rstrip() for line in printed.getvalue().splitlines() if line.strip()], per_class
