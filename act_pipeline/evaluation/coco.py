"""COCO's scores of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    """What is needed of a reader (:class:`act_pipeline.data.Reader` has it)."""

    def annotation_file(self, split: str) -> Any:
        """Return the path of the COCO annotation file of ``split``."""


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
    def load(cls, reader: AnnotatedReader, split: str) -> GroundTruth:
        """Read a split's annotation file; raises a UserError where it is missing or not in COCO's form."""
        path = reader.annotation_file(split)
        annotations = Annotations.load(path, f"the reader's {split} split")
        class_ids = getattr(reader, "class_ids", None)
        return cls(path, annotations.ground_truth(), class_ids(annotations) if class_ids else annotations.category_ids)


@dataclass(frozen=True)
class CategoryMatches:
    """What became of one category's detections: the surest first, up to the last that is right at any IoU threshold.

    Those after it change no precision at any recall, and are left out.

    Attributes:
        images: int32 [D]: of which image each is, as its place in ``Matches.image_ids``.
        right: for each IoU threshold, int32: the detections that found an object.
        ignored: for each IoU threshold, int32: those that count as nothing (in a crowd region, say).
        objects: int32 [G]: of which image each object is that counts.
    """

    images: np.ndarray
    right: list[np.ndarray]
    ignored: list[np.ndarray]
    objects: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Detections matched with the ground truth, once, by pycocotools: objects of any size, at most 100 detections an
    image and category.

    Attributes:
        image_ids: of the images that were evaluated, in ascending order.
        categories: in ascending order of their ids.
    """

    image_ids: list[int]
    categories: list[CategoryMatches]


@dataclass(frozen=True)
class Scores:
    """What COCO's evaluation says.

    Attributes:
        stats: the twelve figures by the names in ``STAT_NAMES``; -1 where there is no ground truth (of that size).
        summary: the twelve lines that pycocotools prints.
        per_category: AP at IoU 0.50:0.95 by category id in ascending order; None for one without ground truth.
        matches: what they are made from.
    """

    stats: dict[str, float]
    summary: list[str]
    per_category: list[float | None]
    matches: Matches


def score_detections(coco: Any, detections: np.ndarray, image_ids: Sequence[int]) -> Scores:
    """Score detections against pycocotools' ``COCO``.

    Args:
        coco: the ground truth, of these images and maybe more.
        detections: [M, 7] as ``Evaluation.detections``.
        image_ids: of the images that were evaluated, in ascending order: what the detections' first column counts.
    """
    scorer = make_scorer(coco, detections, image_ids)
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


def match_detections(coco: Any, detections: np.ndarray, image_ids: Sequence[int]) -> Matches:
    """Match detections as :func:`score_detections` does, without the scores."""
    scorer = make_scorer(coco, detections, image_ids)
    scorer.params.areaRng, scorer.params.areaRngLbl = scorer.params.areaRng[:1], scorer.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    return _matches(scorer)


def make_scorer(coco: Any, detections: np.ndarray, image_ids: Sequence[int]) -> Any:
    """Return pycocotools' ``COCOeval`` of what :func:`score_detections` takes.

    Not by ``COCO.loadRes``, which makes ids of floats, fails on no detections, and draws a polygon round every box.
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
    with contextlib.redirect_stdout(io.StringIO()):
        results.createIndex()
        scorer = COCOeval(coco, results, "bbox")
    scorer.params.imgIds = list(image_ids)
    return scorer


def placed(detections: np.ndarray, image_ids: Sequence[int], place_of: Mapping[int, int]) -> np.ndarray:
    """Return detections of ``image_ids`` with other places for their images, without those that have none."""
    places = np.array([place_of.get(number, -1) for number in image_ids], np.int64)
    found = detections.copy()
    found[:, 0] = places[detections[:, 0].astype(np.int64)]
    return found[found[:, 0] >= 0]


def places_of(image_ids: Sequence[int]) -> dict[int, int]:
    """Return the place of each image, by id."""
    return {number: place for place, number in enumerate(image_ids)}


def _matches(scorer: Any) -> Matches:
    """Return what COCOeval's ``evaluate`` found for objects of any size, which are the first of its areas."""
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
        order = np.argsort(-scores, kind="mergesort")  # as accumulate has it: equal scores in the order of the images
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
