"""COCO's scores of detections, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
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
        category_ids: by class index: the file's order.
    """

    path: Any
    coco: Any
    category_ids: list[int]

    @classmethod
    def load(cls, reader: AnnotatedReader, split: str) -> GroundTruth:
        """Read a split's annotation file; raises a UserError where it is missing or not in COCO's form."""
        path = reader.annotation_file(split)
        coco = Annotations.load(path, f"the reader's {split} split").ground_truth()
        return cls(path, coco, coco.getCatIds())


def score_detections(
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
