"""How far a version's detections are from the float model's on the same images; needs no labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Optional

import numpy as np

from act_pipeline.evaluation.agreement import agreement
from act_pipeline.evaluation.detection_rows import rows_of_outputs
from act_pipeline.evaluation.matching import match


@dataclass(frozen=True)
class Disagreement:
    """Sums over images; those of several images are added.

    Attributes:
        images: number of images.
        boxes: the float model's boxes with a score above 0.3.
        matched: those for which the version has a box of the same class with an IoU of at least 0.5.
        iou: sum of the IoUs of the matched boxes.
        score_shift: sum of the absolute differences of the scores of the matched boxes.
        agreed: sum of the agreements of :func:`act_pipeline.evaluation.matching.match`.
        objects: pairs, and detections above 0.3 that only one model has.
    """

    images: int = 0
    boxes: int = 0
    matched: int = 0
    iou: float = 0.0
    score_shift: float = 0.0
    agreed: float = 0.0
    objects: int = 0

    @classmethod
    def of(cls, reference: np.ndarray, other: np.ndarray) -> Disagreement:
        """Compare the detections of one image.

        Args:
            reference, other: ``bbox [K, 6]`` of the float model and of the version: class, score, x1, y1, x2, y2.
        """
        pairs = match(reference, other)
        found = agreement(_rows(reference), _rows(other))
        matched = round((found.matched or 0.0) * found.boxes)
        iou, shift = (found.mean_iou or 0.0) * matched, (found.mean_score_change or 0.0) * matched
        return cls(1, found.boxes, matched, iou, shift, float(pairs.agreement.sum()), pairs.counted)

    @classmethod
    def total(cls, parts: Iterable[Disagreement]) -> Disagreement:
        """Return the sums over all images."""
        rows = [astuple(part) for part in parts]
        return cls(*map(sum, zip(*rows))) if rows else cls()

    @property
    def change(self) -> Optional[float]:
        """Change of the detections, from 0 (identical) to 1; None without objects.

        :func:`act_pipeline.evaluation.agreement.detection_change` of all images: missed and added boxes, moved boxes
        and changed scores in one number.
        """
        return 1 - self.agreed / self.objects if self.objects else None

    @property
    def matched_share(self) -> Optional[float]:
        """Share of the float model's boxes that are matched; None without boxes."""
        return self.matched / self.boxes if self.boxes else None

    @property
    def mean_iou(self) -> Optional[float]:
        """Mean IoU of the matched boxes; None without any."""
        return self.iou / self.matched if self.matched else None

    @property
    def mean_score_shift(self) -> Optional[float]:
        """Mean absolute difference of the matched boxes' scores; None without any."""
        return self.score_shift / self.matched if self.matched else None


def _rows(bbox: np.ndarray) -> np.ndarray:
    """Return rows of ``Evaluation.detections`` [K, 7] of one image, with the class in place of the category."""
    found = bbox[bbox[:, 0] >= 0]
    return rows_of_outputs(found, np.zeros(len(found)))
