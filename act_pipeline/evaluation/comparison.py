"""Comparison of two models on the same images: difference of the mAPs with a confidence interval, and agreement."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.evaluation.agreement import Agreement, agreement
from act_pipeline.evaluation.coco import GroundTruth, Matches, match_detections, placed, places_of
from act_pipeline.evaluation.confidence import LEVEL, MapDifference, map_difference
from act_pipeline.evaluation.detections_file import load_detections
from act_pipeline.evaluation.result import Evaluation


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, the float model.

    Attributes:
        difference: difference of the mAPs; None if the images have no ground truth.
        agreement: agreement of the detections.
        images: number of images that both models were evaluated on.
    """

    difference: Optional[MapDifference]
    agreement: Agreement
    images: int

    def as_record(self, max_drop: Optional[float]) -> dict[str, Any]:
        """Return the comparison as stored in ``act.json`` and ``eval.json``.

        Args:
            max_drop: the allowed mAP drop, in [0, 1]; None for no limit.

        Returns:
            * ``map_drop_interval``: interval of the drop (reference - model) with ``low`` and ``high`` (the bounds
              containing ``level`` of the resamples), ``level``, ``resamples`` and ``standard_error``;
            * ``probability_within_max_drop``: share of the resamples within ``max_drop``;
            * ``images_needed``: number of images that would decide whether the drop is within ``max_drop``; None if the
              present images decide it or no number would;
            * ``agreement``: see :class:`act_pipeline.evaluation.agreement.Agreement`.
        """
        found = self.difference
        record = {**NOT_COMPARED, "agreement": self.agreement.as_record()}
        if found is None:
            return record
        record["map_drop_interval"] = {
            "low": -found.high,
            "high": -found.low,
            "level": LEVEL,
            "resamples": found.resamples,
            "standard_error": found.standard_error,
        }
        if max_drop is not None:
            record["probability_within_max_drop"] = found.probability(max_drop)
            record["images_needed"] = None if found.tells(max_drop) else found.images_needed(max_drop)
        return record


NOT_COMPARED: Mapping[str, Any] = {
    "map_drop_interval": None, "probability_within_max_drop": None, "images_needed": None, "agreement": None,
}  # fmt: skip


def compare(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Comparison:
    """Compare a model's evaluation with a reference's on the same images.

    Missing ``matches`` are computed and cached in both evaluations.

    Args:
        reference, other: the two evaluations.
        truth: the ground truth that both were scored against.
    """
    return Comparison(
        map_difference(_matches(reference, truth), _matches(other, truth)),
        agreement(reference.detections, other.detections),
        len(other.image_ids),
    )


def _matches(evaluation: Evaluation, truth: GroundTruth) -> Matches:
    if evaluation.matches is None:
        evaluation.matches = match_detections(truth.coco, evaluation.detections, evaluation.image_ids)
    return evaluation.matches


def compare_with_kept(path: str | os.PathLike[str], other: Evaluation, truth: GroundTruth) -> Optional[Comparison]:
    """Compare an evaluation with the float model's detections stored in a ``detections.npz``.

    Args:
        path: the file.
        other: the evaluation.
        truth: the ground truth that it was scored against.

    Returns:
        the comparison on the images that both have; None if the file has no float detections, or if neither image set
        contains the other (compared by id and file name), i.e. the data sets differ.

    Raises:
        UserError: the file is missing or damaged.
    """
    kept = load_detections(path)
    common = kept.known({number: truth.coco.imgs[number]["file_name"] for number in other.image_ids})
    if "fp32" not in kept.rows or not common or len(common) < min(len(kept.image_ids), len(other.image_ids)):
        return None
    place_of = places_of(common)
    before = placed(kept.rows["fp32"], kept.image_ids, place_of)
    after = placed(other.detections, other.image_ids, place_of)
    matches = other.matches if common == other.image_ids else None
    return Comparison(
        map_difference(
            match_detections(truth.coco, before, common), matches or match_detections(truth.coco, after, common)
        ),
        agreement(before, after),
        len(common),
    )


def compare_on_some(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Optional[MapDifference]:
    """Compare the mAPs of two evaluations on the images of ``other``, a subset of the reference's images.

    Args:
        reference, other: the two evaluations.
        truth: the ground truth that both were scored against.

    Returns:
        mAP of ``other`` - mAP of ``reference``; None if these images have no ground truth.
    """
    ids = other.image_ids
    some = placed(reference.detections, reference.image_ids, places_of(ids))
    matches = other.matches or match_detections(truth.coco, other.detections, ids)
    return map_difference(match_detections(truth.coco, some, ids), matches)
