"""COCO scores of detections, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import numpy as np

from act_pipeline.data.annotations import Annotations

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


class AnnotatedReader(Protocol):
    """The part of a reader that scoring needs (:class:`act_pipeline.data.Reader` implements it)."""

    def annotation_file(self, split: str) -> Any:
        """Return the path of the COCO annotation file of ``split``."""


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth that detections are scored against.

    Attributes:
        path: the annotation file; of images without labels, their folder.
        coco: the file as a pycocotools ``COCO`` object.
        category_ids: the COCO category id of every class index: the reader's ``class_ids`` if it has that method,
            otherwise the order of the file.
    """

    path: Any
    coco: Any
    category_ids: list[int]

    @classmethod
    def load(cls, reader: AnnotatedReader, split: str) -> GroundTruth:
        """Read a split's annotation file; images without labels have no objects (``Reader.labelled``).

        Args:
            reader: provides the path of the file.
            split: ``eval`` or ``train``.

        Raises:
            UserError: the file is missing or not in COCO's form.
        """
        given: Any = reader
        if not hasattr(given, "labelled") or given.labelled(split):
            path = reader.annotation_file(split)
            annotations = Annotations.load(path, f"the reader's {split} split")
        else:
            annotations = given.annotations(split)
            path = annotations.path
        class_ids = getattr(reader, "class_ids", None)
        return cls(path, annotations.ground_truth(), class_ids(annotations) if class_ids else annotations.category_ids)


@dataclass(frozen=True)
class CategoryMatches:
    """Matching result of one category's detections, in descending order of score.

    The list ends at the last detection that is correct at any IoU threshold: later ones change no precision at any
    recall.

    Attributes:
        images: int32 [D], for each detection the index of its image in ``Matches.image_ids``.
        right: for each IoU threshold, int32 indices of the true positives.
        ignored: for each IoU threshold, int32 indices of the detections that count neither way (e.g. those in a crowd
            region).
        objects: int32 [G], for each ground-truth object that counts, the index of its image.
    """

    images: np.ndarray
    right: list[np.ndarray]
    ignored: list[np.ndarray]
    objects: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Detections matched with the ground truth by pycocotools.

    Objects of all sizes are included, with at most 100 detections per image and category.

    Attributes:
        image_ids: COCO ids of the evaluated images, in ascending order.
        categories: one entry per category, in ascending order of the ids.
    """

    image_ids: list[int]
    categories: list[CategoryMatches]


@dataclass(frozen=True)
class Scores:
    """Result of a COCO evaluation.

    Attributes:
        stats: the twelve COCO metrics under the names in ``STAT_NAMES``; -1 where there is no ground truth (of that
            size).
        summary: the twelve lines printed by pycocotools.
        per_category: AP at IoU 0.50:0.95 in ascending order of category id; None for a category without ground truth.
        matches: the matching that the scores are computed from.
    """

    stats: dict[str, float]
    summary: list[str]
    per_category: list[float | None]
    matches: Matches


def score_detections(
    coco: Any, detections: np.ndarray, image_ids: Sequence[int], masks: Optional[Sequence[Any]] = None
) -> Scores:
    """Score detections against a pycocotools ``COCO`` object.

    Args:
        coco: the ground truth of these images; it may contain others.
        detections: float64 [M, 7], see ``Evaluation.detections``.
        image_ids: COCO ids of the evaluated images, in ascending order; the first column of ``detections`` indexes this
            list.
        masks: mask of each detection, COCO's run lengths, which is scored instead of its box; None: boxes are scored.
    """
    scorer = make_scorer(coco, detections, image_ids, masks)
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
        scorer.accumulate()
        with contextlib.redirect_stdout(printed):
            scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all areas, 100 detections
    per_category: list[float | None] = []
    for index in range(precision.shape[2]):
        valid = precision[:, :, index][precision[:, :, index] > -1]
        per_category.append(float(valid.mean()) if valid.size else None)
    stats = {name: float(value) for name, value in zip(STAT_NAMES, scorer.stats)}
    summary = [line.rstrip() for line in printed.getvalue().splitlines() if line.strip()]
    return Scores(stats, summary, per_category, _matches(scorer))


def match_detections(
    coco: Any, detections: np.ndarray, image_ids: Sequence[int], masks: Optional[Sequence[Any]] = None
) -> Matches:
    """Match detections as :func:`score_detections` does (same arguments), without computing the scores."""
    scorer = make_scorer(coco, detections, image_ids, masks)
    scorer.params.areaRng, scorer.params.areaRngLbl = scorer.params.areaRng[:1], scorer.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    return _matches(scorer)


def make_scorer(
    coco: Any, detections: np.ndarray, image_ids: Sequence[int], masks: Optional[Sequence[Any]] = None
) -> Any:
    """Return a pycocotools ``COCOeval`` for the arguments of :func:`score_detections`, not yet evaluated.

    ``COCO.loadRes`` is not used: it converts ids to floats, fails on an empty list, and creates a polygon for every
    box.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = COCO()
    results.dataset = {
        "images": coco.dataset["images"],
        "categories": coco.dataset["categories"],
        "annotations": [
            {
                "id": number, "image_id": image_ids[int(place)], "category_id": int(category),
                "bbox": [x, y, width, height], "area": width * height, "score": score, "iscrowd": 0,
            }
            for number, (place, x, y, width, height, score, category) in enumerate(detections.tolist(), start=1)
        ],
    }  # fmt: skip
    if masks is not None:
        from pycocotools import mask as coco_mask

        for annotation, mask in zip(results.dataset["annotations"], masks):
            annotation.update(segmentation=mask, area=float(coco_mask.area(mask)))
    with contextlib.redirect_stdout(io.StringIO()):
        results.createIndex()
        scorer = COCOeval(coco, results, "bbox" if masks is None else "segm")
    scorer.params.imgIds = list(image_ids)
    return scorer


def placed(detections: np.ndarray, image_ids: Sequence[int], place_of: Mapping[int, int]) -> np.ndarray:
    """Re-index the images of detections.

    Args:
        detections: float64 [M, 7]; the first column indexes ``image_ids``.
        image_ids: COCO ids.
        place_of: COCO id -> new index.

    Returns:
        float64 [K, 7], a copy with the new indices; detections of images without one are dropped.
    """
    places = np.array([place_of.get(number, -1) for number in image_ids], np.int64)
    found = detections.copy()
    found[:, 0] = places[detections[:, 0].astype(np.int64)]
    return found[found[:, 0] >= 0]


def placed_masks(
    masks: Sequence[Any], detections: np.ndarray, image_ids: Sequence[int], place_of: Mapping[int, int]
) -> list[Any]:
    """Return the masks of the detections that :func:`placed` keeps, for the same arguments."""
    images = detections[:, 0].astype(np.int64).tolist()
    return [mask for mask, image in zip(masks, images) if image_ids[image] in place_of]


def places_of(image_ids: Sequence[int]) -> dict[int, int]:
    """Return the index of each image by its id."""
    return {number: place for place, number in enumerate(image_ids)}


def _matches(scorer: Any) -> Matches:
    """Convert the result of ``COCOeval.evaluate`` for objects of all sizes, the first of its area ranges."""
    params = scorer.params
    count, thresholds = len(params.imgIds), len(params.iouThrs)
    step = count * len(params.areaRng)
    categories = []
    for start in range(0, step * len(params.catIds), step):
        found = scorer.evalImgs[start : start + count]
        there = [(place, entry) for place, entry in enumerate(found) if entry is not None]
        places = np.array([place for place, _ in there], np.int32)
        entries = [entry for _, entry in there]
        nothing = np.zeros((thresholds, 0))
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for entry in entries)])
        order = np.argsort(-scores, kind="mergesort")  # stable, as in COCOeval.accumulate
        images = np.repeat(places, [len(entry["dtScores"]) for entry in entries])[order]
        matched = np.concatenate([nothing, *(entry["dtMatches"] for entry in entries)], axis=1)[:, order] != 0
        ignored = np.concatenate([nothing, *(entry["dtIgnore"] for entry in entries)], axis=1)[:, order] != 0
        right = matched & ~ignored
        end = int(np.flatnonzero(right.any(axis=0))[-1]) + 1 if right.any() else 0
        categories.append(
            CategoryMatches(
                images[:end],
                [np.flatnonzero(row).astype(np.int32) for row in right[:, :end]],
                [np.flatnonzero(row).astype(np.int32) for row in ignored[:, :end]],
                np.repeat(places, [int((np.asarray(entry["gtIgnore"]) == 0).sum()) for entry in entries]),
            )
        )
    return Matches([int(image_id) for image_id in params.imgIds], categories)
