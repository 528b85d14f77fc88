"""Two models on the same images: the difference of their mAPs with its interval, and how far they detect the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.evaluation.agreement import Agreement, agreement
from act_pipeline.evaluation.coco import GroundTruth, match_detections, placed, places_of
from act_pipeline.evaluation.confidence import LEVEL, MapDifference, map_difference
from act_pipeline.evaluation.result import Evaluation


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, the float model.

    Attributes:
        difference: of the mAPs; None: the images have no ground truth.
        agreement: of the detections.
    """

    difference: Optional[MapDifference]
    agreement: Agreement

    def as_record(self, max_drop: Optional[float]) -> dict[str, Any]:
        """Return what ``act.json`` and ``eval.json`` say.

        ``map_drop_interval`` is of the drop, reference - model: ``low``, ``high`` (which hold ``level`` of the resamples),
        ``level``, ``resamples``, ``standard_error``; ``probability_within_max_drop`` the share of resamples within
        ``max_drop``; ``images_needed`` how many images would tell whether the drop is within ``max_drop``, None where
        these do or no number would; and ``agreement``.
        """
        found, limited = self.difference, self.difference is not None and max_drop is not None
        return {
            "map_drop_interval": None if found is None else {
                "low": -found.high,
                "high": -found.low,
                "level": LEVEL,
                "resamples": found.resamples,
                "standard_error": found.standard_error,
            },
            "probability_within_max_drop": found.probability(max_drop) if limited else None,
            "images_needed": found.images_needed(max_drop) if limited and not found.tells(max_drop) else None,
            "agreement": self.agreement.as_record(),
        }  # fmt: skip


NOT_COMPARED: Mapping[str, Any] = {
    "map_drop_interval": None, "probability_within_max_drop": None, "images_needed": None, "agreement": None,
}  # fmt: skip


def compare(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Comparison:
    """Compare a model's evaluation with a reference's on the same images; both keep their matches for the next time.

    Args:
        reference, other: evaluations of the two.
        truth: what both were scored against.
    """
    for evaluation in (reference, other):
        if evaluation.matches is None:
            evaluation.matches = match_detections(truth.coco, evaluation.detections, evaluation.image_ids)
    return Comparison(
        map_difference(reference.matches, other.matches), agreement(reference.detections, other.detections)
    )


def compare_on_some(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Optional[MapDifference]:
    """Return mAP of ``other`` - mAP of ``reference`` on the images of ``other``, which are some of the reference's.

    Returns:
        None where these images have no ground truth.
    """
    ids = other.image_ids
    some = placed(reference.detections, reference.image_ids, places_of(ids))
    matches = other.matches or match_detections(truth.coco, other.detections, ids)
    return map_difference(match_detections(truth.coco, some, ids), matches)
