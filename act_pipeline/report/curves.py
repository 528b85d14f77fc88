"""Scores and precision-recall curves of stored detections, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.data.annotations import Annotations
from act_pipeline.evaluation.coco import STAT_NAMES, make_scorer

RECALLS = tuple(round(float(recall), 2) for recall in np.linspace(0, 1, 101))
CURVE_IOUS = (0.5, 0.75)


@dataclass(frozen=True)
class Scores:
    """COCO scores and curves of a model's detections.

    Attributes:
        stats: the twelve COCO metrics under the names in ``STAT_NAMES``; None where there is no ground truth (of that
            size).
        per_class: class name -> AP at IoU 0.50:0.95; None for a class without ground truth.
        curves: IoU (e.g. ``0.50``) -> 101 precisions at ``RECALLS``, the mean over the classes with ground truth.
        class_curves: class name -> 101 precisions at IoU 0.50; None for a class without ground truth.
    """

    stats: dict[str, float | None]
    per_class: dict[str, float | None]
    curves: dict[str, list[float]]
    class_curves: dict[str, list[float] | None]


def score(
    annotations: Annotations, detections: np.ndarray, image_ids: Sequence[int], masks: Sequence[Any] | None = None
) -> Scores:
    """Score detections and compute precision-recall curves.

    Args:
        annotations: the ground truth.
        detections: float64 [M, 7], see ``Evaluation.detections``.
        image_ids: COCO ids of the evaluated images, in ascending order.
        masks: mask of each detection, COCO's run lengths, which is scored instead of its box; None: boxes are scored.
    """
    truth = annotations.ground_truth()
    scorer = make_scorer(truth, detections, image_ids, masks)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    names = {category["id"]: str(category["name"]) for category in truth.dataset["categories"]}
    ordered = [names[category_id] for category_id in scorer.params.catIds]
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all areas, 100 detections
    known = (precision > -1).any(axis=(0, 1))
    places = {f"{iou:.2f}": int(np.argmin(np.abs(scorer.params.iouThrs - iou))) for iou in CURVE_IOUS}
    at_half = precision[places["0.50"]]
    return Scores(
        stats={name: _known(value) for name, value in zip(STAT_NAMES, scorer.stats)},
        per_class={
            name: float(precision[:, :, index].mean()) if known[index] else None for index, name in enumerate(ordered)
        },
        curves={
            name: _rounded(precision[place][:, known].mean(axis=1)) for name, place in places.items() if known.any()
        },
        class_curves={
            name: _rounded(at_half[:, index]) if known[index] else None for index, name in enumerate(ordered)
        },
    )


def _known(value: Any) -> float | None:
    return float(value) if value > -1 else None


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
