"""Run an engine on a data set, score its detections and measure its latency."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Protocol

import numpy as np

from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.progress import Progress
from act_pipeline.data.annotations import distinct_names
from act_pipeline.engines.interface import Engine
from act_pipeline.evaluation.batches import BatchRun, Detector, latency_percentiles, run_batches, run_in_parallel
from act_pipeline.evaluation.coco import AnnotatedReader, GroundTruth, placed, places_of, score_detections
from act_pipeline.evaluation.masks import mask_sums, mean_iou, require_masks
from act_pipeline.evaluation.result import Evaluation
from act_pipeline.families.interface import PROMPTS


class EvaluationReader(AnnotatedReader, Protocol):
    """The part of a reader that evaluation needs (:class:`act_pipeline.data.Reader` implements it)."""

    def loader(
        self, split: str, *, batch_size: int, shuffle: bool, drop_last: bool, workers: int | None = None
    ) -> Iterable[Mapping[str, np.ndarray]]:
        """Return batches: dicts of the engine's inputs and ``im_id`` int64 [N]."""


def evaluate(
    engine: Detector,
    reader: EvaluationReader,
    split: str = "eval",
    *,
    limit: int | None = None,
    progress: bool = True,
    batch_size: int = 1,
    warmup: int = 1,
) -> Evaluation:
    """Run every image of a split through an engine and score the detections.

    Args:
        engine: an :class:`act_pipeline.engines.interface.Engine`; it is not closed.
        reader: provides the batches and the annotation file.
        split: ``eval`` or ``train``, a split of the reader.
        limit: evaluate the first so many images only; None for all.
        progress: show a progress bar on stderr.
        batch_size: images per run.
        warmup: untimed runs of the first batch.

    Raises:
        UserError: no image could be read, the model's classes do not fit the annotations, or its outputs are not
            finite.
    """
    # Prefetching on the cores that the engine uses would increase the measured latency.
    alone = engine.device == "CPU" and engine.threads >= available_cpus()
    workers = 0 if alone else None
    loader = reader.loader(split, batch_size=batch_size, shuffle=False, drop_last=False, workers=workers)
    truth = GroundTruth.load(reader, split)
    batches = _batches(loader, limit, batch_size, progress)
    return score(list(run_batches(engine, batches, truth.category_ids, truth.path, warmup)), truth, batch_size)


def evaluate_in_parallel(
    engines: Sequence[Engine],
    reader: EvaluationReader,
    split: str = "eval",
    progress: bool = True,
    limit: int | None = None,
    batch_size: int = 1,
    before: Evaluation | None = None,
) -> Evaluation:
    """Evaluate as :func:`evaluate` does with the highest throughput, for scores rather than latencies.

    Images are read in parallel with inference, and each image goes to the next free engine.

    Args:
        engines: engines of one model, see :func:`act_pipeline.evaluation.batches.run_in_parallel`; they are not closed.
            One that takes several requests is here as many times.
        reader, split, progress, limit, batch_size: see :func:`evaluate`.
        before: an evaluation of the same model on the first images, which are not run again; with batch size 1 only.

    Returns:
        an evaluation whose ``latency_ms`` is None if there are several engines, and whose ``images_per_second`` is
        images / the time from the first image to the last.

    Raises:
        UserError: see :func:`evaluate`.
    """
    loader = reader.loader(split, batch_size=batch_size, shuffle=False, drop_last=False)
    truth = GroundTruth.load(reader, split)
    done = [] if before is None else before.image_ids
    batches = _batches(loader, limit, batch_size, progress, done)
    start = time.perf_counter()
    runs = list(run_in_parallel(engines, batches, truth.category_ids, truth.path))
    seconds = time.perf_counter() - start
    if before is not None:
        runs.insert(0, BatchRun(tuple(done), before.detections, 0.0, before.masks))
    found = score(runs, truth, batch_size)
    latency_ms = None if len(engines) > 1 else found.latency_ms
    new = found.images - len(done)
    return replace(found, latency_ms=latency_ms, images_per_second=new / max(seconds, 1e-9))


def score(runs: Sequence[BatchRun], truth: GroundTruth, batch_size: int) -> Evaluation:
    """Score the detections of all batches, in whichever process they were computed.

    Args:
        runs: results of the batches, in the order of the images.
        truth: ground truth of these images; it may contain others.
        batch_size: size of a full batch; latencies are of full batches only, if there are any.

    Raises:
        UserError: there are no images.
    """
    image_ids = sorted({image_id for run in runs for image_id in run.image_ids})
    if not image_ids:
        raise UserError(f"{truth.path}: no image could be evaluated, expected at least one")
    place_of = places_of(image_ids)
    detections = np.concatenate([placed(run.detections, run.image_ids, place_of) for run in runs])
    masks = None
    if runs[0].masks is not None:
        require_masks(truth, image_ids)
        masks = [mask for run in runs for mask in run.masks or ()]
    scores = score_detections(truth.coco, detections, image_ids, masks)
    miou = -1.0 if masks is None else mean_iou(mask_sums(truth, detections, masks, image_ids))
    category_ids = truth.coco.getCatIds()
    names = distinct_names([str(category["name"]) for category in truth.coco.loadCats(category_ids)], category_ids)
    name_of = dict(zip(category_ids, names))
    seconds, images = [run.seconds for run in runs], len(image_ids)
    whole = [run.seconds for run in runs if len(run.image_ids) == batch_size] or seconds
    return Evaluation(
        map=scores.stats["ap"],
        map50=scores.stats["ap50"],
        stats=scores.stats,
        summary=scores.summary,
        per_class={
            name_of[category_id]: ap
            for category_id, ap in zip(sorted(category_ids), scores.per_category)
            if category_id in truth.category_ids
        },
        images=images,
        batch_size=batch_size,
        latency_ms=latency_percentiles(whole),
        images_per_second=images / max(sum(seconds), 1e-9),
        detections=detections,
        image_ids=image_ids,
        masks=masks,
        miou=miou if miou >= 0 else None,
        matches=scores.matches,
    )


def _batches(
    loader: Iterable[Mapping[str, np.ndarray]],
    limit: int | None,
    batch_size: int,
    progress: bool,
    done: Collection[int] = (),
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches of the first ``limit`` images, without those whose images are ``done``."""
    total = len(loader) if isinstance(loader, Sized) else None
    if limit is not None:
        wanted = -(-limit // batch_size)
        total = wanted if total is None else min(total, wanted)
    seen: set[int] = set()
    done = set(done)
    total = None if total is None else total - len(done) // batch_size
    with Progress("evaluate", "batch", total, shown=progress) as bar:
        for batch in loader:
            if done.issuperset(np.asarray(batch["im_id"]).reshape(-1).tolist()):
                seen.update(np.asarray(batch["im_id"]).reshape(-1).tolist())
                continue
            if limit is not None:
                taken = _of_first_images(batch["im_id"], seen, limit)
                if taken < len(batch["im_id"]):
                    if taken:
                        yield {name: array[:taken] for name, array in batch.items()}
                        bar.update()
                    break
            yield batch
            bar.update()
            # Stop here, or the loader would read another batch; but prompts of the last image may follow.
            if limit is not None and len(seen) >= limit and PROMPTS not in batch:
                break


def _of_first_images(image_ids: np.ndarray, seen: set[int], limit: int) -> int:
    """Return how many rows of a batch, from the first on, are of the first images; ``seen`` grows by theirs."""
    for row, number in enumerate(np.asarray(image_ids).reshape(-1).tolist()):
        if number not in seen and len(seen) >= limit:
            return row
        seen.add(number)
    return len(image_ids)
