"""Comparison of two models on the same images: difference of the mAPs with a confidence interval, and agreement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.evaluation.agreement import Agreement, MaskPair, agreement, image_sums
from act_pipeline.evaluation.coco import GroundTruth, Matches, match_detections, placed, placed_masks, places_of
from act_pipeline.evaluation.confidence import (
    LEVEL,
    AgreementLoss,
    Difference,
    MapDifference,
    MiouDifference,
    agreement_loss,
    map_difference,
    miou_difference,
)
from act_pipeline.evaluation.detections_file import load_detections
from act_pipeline.evaluation.masks import mask_sums
from act_pipeline.evaluation.result import Evaluation


@dataclass(frozen=True)
class Interval:
    """Confidence interval of a figure, over resamples of the images: for the mAP drop, reference - model.

    Attributes:
        low, high: the bounds that contain ``level`` of the resampled figures.
        level: confidence level, in [0, 1].
        resamples: number of resamples.
        standard_error: standard deviation of the resampled figures.
    """

    low: float
    high: float
    level: float
    resamples: int
    standard_error: Optional[float] = None


@dataclass(frozen=True)
class AgreementInterval(Interval):
    """The agreement of a model with the reference, and its interval.

    Attributes:
        value: the agreement on the original images, in [0, 1]: 1 minus
            :func:`act_pipeline.evaluation.agreement.detection_change`.
    """

    value: float = 0.0


@dataclass(frozen=True)
class ComparisonFigures:
    """Figures of a comparison with the float model, as in ``act.json`` and ``eval.json``; None where not measured.

    Attributes:
        map_drop_interval: two-sided confidence interval of the mAP drop.
        probability_within_max_drop: share of the resamples within ``max_drop``, in [0, 1]; None without ``max_drop``.
        images_needed: number of images that would decide whether the drop is within ``max_drop``; None if the present
            images decide it or no number would.
        agreement: agreement of the detections.
        agreement_interval: the agreement in one number, with its confidence interval.
        probability_of_min_agreement: share of the resamples with at least ``min_agreement``, in [0, 1]; None without
            ``min_agreement``.
        agreement_images_needed: as ``images_needed``, for ``min_agreement``.
        miou_drop_interval: confidence interval of the drop of the mean IoU of masks; None for models without masks.
    """

    map_drop_interval: Optional[Interval] = None
    probability_within_max_drop: Optional[float] = None
    images_needed: Optional[int] = None
    agreement: Optional[Agreement] = None
    agreement_interval: Optional[AgreementInterval] = None
    probability_of_min_agreement: Optional[float] = None
    agreement_images_needed: Optional[int] = None
    miou_drop_interval: Optional[Interval] = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ComparisonFigures:
        """Read the figures from a record, which may have other keys, and lack these in earlier versions."""
        interval, agreed = record.get("map_drop_interval"), record.get("agreement")
        value, miou = record.get("agreement_interval"), record.get("miou_drop_interval")
        return cls(
            None if interval is None else Interval(**interval),
            record.get("probability_within_max_drop"),
            record.get("images_needed"),
            None if agreed is None else Agreement(**agreed),
            None if value is None else AgreementInterval(**value),
            record.get("probability_of_min_agreement"),
            record.get("agreement_images_needed"),
            None if miou is None else Interval(**miou),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entries of a record: one for each attribute, that of masks only if there are any."""
        entries = asdict(self)
        if self.miou_drop_interval is None:
            del entries["miou_drop_interval"]
        return entries

    def decides(self, max_drop: Optional[float]) -> bool:
        """Return whether the confidence interval of the mAP drop is on one side of ``max_drop``.

        Args:
            max_drop: the largest allowed mAP drop; None: any.

        Returns:
            False if the interval contains ``max_drop``; True also without an interval or a ``max_drop``.
        """
        found = self.map_drop_interval
        return found is None or max_drop is None or not found.low <= max_drop < found.high

    def decides_agreement(self, min_agreement: Optional[float]) -> bool:
        """Return the same as :meth:`decides` for the interval of the agreement and ``min_agreement``."""
        found = self.agreement_interval
        return found is None or min_agreement is None or not found.low < min_agreement <= found.high


@dataclass(frozen=True)
class Comparison:
    """A model compared with a reference, the float model.

    Attributes:
        difference: difference of the mAPs; None if the images have no ground truth.
        agreement: agreement of the detections.
        images: number of images that both models were evaluated on.
        loss: the agreement in one number - 1; None if neither model detects an object.
        miou: difference of the mean IoUs of the masks; None without masks or ground truth.
    """

    difference: Optional[MapDifference]
    agreement: Agreement
    images: int
    loss: Optional[AgreementLoss] = None
    miou: Optional[MiouDifference] = None

    def figures(self, max_drop: Optional[float], min_agreement: Optional[float] = None) -> ComparisonFigures:
        """Return the figures stored in ``act.json`` and ``eval.json``.

        Args:
            max_drop: the allowed mAP drop, in [0, 1]; None for no limit.
            min_agreement: the least agreement, in [0, 1]; None for no limit.
        """
        drop, value = None, None
        if self.difference is not None:
            drop = _drop_interval(self.difference)
        if self.loss is not None:
            lost = self.loss
            value = AgreementInterval(
                1 + lost.low, 1 + lost.high, LEVEL, lost.resamples, lost.standard_error, value=lost.agreement
            )
        probability, needed = _decided(self.difference, max_drop)
        sure, more = _decided(self.loss, None if min_agreement is None else 1 - min_agreement)
        miou = None if self.miou is None else _drop_interval(self.miou)
        return ComparisonFigures(drop, probability, needed, self.agreement, value, sure, more, miou)


def _drop_interval(found: Difference) -> Interval:
    return Interval(-found.high, -found.low, LEVEL, found.resamples, found.standard_error)


def _decided(found: Optional[Difference], max_drop: Optional[float]) -> tuple[Optional[float], Optional[int]]:
    """Return the share of the resamples within a limit, and how many images would decide it if these do not."""
    if found is None or max_drop is None:
        return None, None
    return found.probability(max_drop), None if found.tells(max_drop) else found.images_needed(max_drop)


def compare(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Comparison:
    """Compare a model's evaluation with a reference's on the same images.

    Missing ``matches`` are computed and cached in both evaluations.

    Args:
        reference, other: the two evaluations.
        truth: the ground truth that both were scored against.
    """
    rows = reference.detections, other.detections
    masks = None if reference.masks is None or other.masks is None else (reference.masks, other.masks)
    sums = image_sums(*rows, len(other.image_ids), masks=masks)
    return Comparison(
        map_difference(_matches(reference, truth), _matches(other, truth)),
        agreement(*rows, masks=masks),
        len(other.image_ids),
        agreement_loss(sums),
        _miou_difference(truth, rows, masks, other.image_ids),
    )


def _miou_difference(
    truth: GroundTruth, rows: tuple[np.ndarray, np.ndarray], masks: Optional[MaskPair], image_ids: Sequence[int]
) -> Optional[MiouDifference]:
    """Return the difference of the second model's mean IoU from the first one's; None without masks or objects."""
    if masks is None:
        return None
    one, other = (mask_sums(truth, *side, image_ids) for side in zip(rows, masks))
    return miou_difference(one, other)


def _matches(evaluation: Evaluation, truth: GroundTruth) -> Matches:
    if evaluation.matches is None:
        evaluation.matches = match_detections(truth.coco, evaluation.detections, evaluation.image_ids, evaluation.masks)
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
    masks = None
    if "fp32" in kept.masks and other.masks is not None:
        masks = (
            placed_masks(kept.masks["fp32"], kept.rows["fp32"], kept.image_ids, place_of),
            placed_masks(other.masks, other.detections, other.image_ids, place_of),
        )
    elif other.masks is not None:
        return None  # of a version without masks: boxes and masks cannot be compared
    own = masks or (None, None)
    first = match_detections(truth.coco, before, common, own[0])
    matches = matches or match_detections(truth.coco, after, common, own[1])
    return Comparison(
        map_difference(first, matches),
        agreement(before, after, masks=masks),
        len(common),
        agreement_loss(image_sums(before, after, len(common), masks=masks)),
        _miou_difference(truth, (before, after), masks, common),
    )


def agreement_on_some(reference: Evaluation, other: Evaluation) -> Optional[AgreementLoss]:
    """Return the agreement of two evaluations - 1 on the images of ``other``, a subset of the reference's images.

    None if neither detects an object there.
    """
    some = placed(reference.detections, reference.image_ids, places_of(other.image_ids))
    return agreement_loss(image_sums(some, other.detections, len(other.image_ids)))


def compare_on_some(reference: Evaluation, other: Evaluation, truth: GroundTruth) -> Optional[MapDifference]:
    """Compare the mAPs of two evaluations on the images of ``other``, a subset of the reference's images.

    Args:
        reference, other: the two evaluations.
        truth: the ground truth that both were scored against.

    Returns:
        mAP of ``other`` - mAP of ``reference``; None if these images have no ground truth.
    """
    ids = other.image_ids
    place_of = places_of(ids)
    some = placed(reference.detections, reference.image_ids, place_of)
    masks = None
    if reference.masks is not None:
        masks = placed_masks(reference.masks, reference.detections, reference.image_ids, place_of)
    return map_difference(match_detections(truth.coco, some, ids, masks), _matches(other, truth))
