"""Agreement of the detections of two models on the same images; needs no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.evaluation.matching import MIN_SCORE, overlaps

MATCHED_IOU = 0.5
# Masks of the detections of two models, COCO's run lengths.
MaskPair = tuple[Sequence[Any], Sequence[Any]]


@dataclass(frozen=True)
class Agreement:
    """Agreement of a model's detections with the confident boxes of a reference model.

    Attributes:
        boxes: number of the reference's boxes with a score above the minimum (0.3 by default). Boxes without an area,
            as clipping to the picture leaves of boxes beyond its edge, are not counted: they overlap nothing.
        matched: share of these boxes, in [0, 1], for which the other model has a box of the same image and class with
            an IoU of at least 0.5; None if there are no boxes.
        mean_iou: mean IoU of the matched boxes with the other model's best-overlapping box; None if no box is matched.
        mean_score_change: mean absolute difference of the two scores of the matched boxes; None if no box is matched.
    """

    boxes: int
    matched: Optional[float]
    mean_iou: Optional[float]
    mean_score_change: Optional[float]


def agreement(
    reference: np.ndarray, other: np.ndarray, min_score: float = MIN_SCORE, masks: Optional[MaskPair] = None
) -> Agreement:
    """Compare detections with those of a reference model, e.g. the float model, on the same images.

    Each box of the reference is compared with the other model's box of the same image and class that has the highest
    IoU, whatever its score. Several boxes of the reference may share one box of the other model.

    Args:
        reference, other: float64 [M, 7] and [K, 7], see ``Evaluation.detections``.
        min_score: only boxes of the reference with a higher score are compared.
        masks: masks of both models' detections, whose IoU counts instead of that of the boxes; None: there are none.

    Returns:
        the share of matched boxes, their mean IoU and their mean score change.
    """
    chosen = np.flatnonzero((reference[:, 5] > min_score) & _have_area(reference))
    sure = reference[chosen]
    rows, columns = _of_one_class(sure, other)
    iou = _overlaps(reference, other, chosen[rows], columns, masks)
    # Sort by row, then by descending IoU; lexsort is stable, so the first of equal pairs is chosen.
    order = np.lexsort((-iou, rows))
    _, first = np.unique(rows[order], return_index=True)
    best = order[first]
    best = best[iou[best] >= MATCHED_IOU]
    if not len(best):
        return Agreement(len(sure), 0.0 if len(sure) else None, None, None)
    change = np.abs(sure[rows[best], 5] - other[columns[best], 5])
    return Agreement(len(sure), len(best) / len(sure), float(iou[best].mean()), float(change.mean()))


@dataclass(frozen=True)
class ImageSums:
    """Sums of each image, from which the agreement of two models on any choice of the images is computed.

    Attributes:
        agreed: float64 [I], sum of ``iou * min(s, t) / max(s, t)`` over the pairs of detections (s, t: their scores).
        objects: int64 [I], number of objects: pairs, and detections of one model without a partner.
    """

    agreed: np.ndarray
    objects: np.ndarray


def detection_change(
    reference: np.ndarray, other: np.ndarray, min_score: float = MIN_SCORE, masks: Optional[MaskPair] = None
) -> float:
    """Return the change of detections compared with a reference, from 0 (identical) to 1 (no detection has a partner).

    The measure ranks models on images without labels. It is 1 minus the mean of ``iou * min(s, t) / max(s, t)`` (s, t:
    the two scores) over the objects that reach ``min_score`` in at least one model; an object that only one model
    detects counts 0. It equals :func:`act_pipeline.evaluation.matching.agreement_of` computed over all images together,
    vectorised for many images. ``Strategy.min_agreement`` is a bound on 1 minus the change.

    Args:
        reference, other: float64 [M, 7] and [K, 7], see ``Evaluation.detections``, of the same images.
        min_score: a detection counts as an object if either model scores it at least this high, and it has an area.
        masks: see :func:`agreement`.
    """
    images = int(max((rows[:, 0].max() for rows in (reference, other) if len(rows)), default=-1)) + 1
    sums = image_sums(reference, other, images, min_score, masks)
    objects = int(sums.objects.sum())
    return 1 - float(sums.agreed.sum()) / objects if objects else 0.0


def image_sums(
    reference: np.ndarray,
    other: np.ndarray,
    images: int,
    min_score: float = MIN_SCORE,
    masks: Optional[MaskPair] = None,
) -> ImageSums:
    """Return the sums that :func:`detection_change` is computed from, by image.

    Args:
        reference, other, min_score, masks: see :func:`detection_change`.
        images: number of images I; the first column of the detections is an index below it.
    """
    sure = [(detections[:, 5] >= min_score) & _have_area(detections) for detections in (reference, other)]
    rows, columns = _of_one_class(reference, other, *sure)
    scores = reference[rows, 5], other[columns, 5]
    high = np.maximum(*scores)
    agreed = _overlaps(reference, other, rows, columns, masks)
    agreed = agreed * np.minimum(*scores) / np.maximum(high, 1e-12)
    kept = np.flatnonzero(agreed > 0)
    kept = kept[np.argsort(-agreed[kept], kind="stable")]
    free = [np.ones(len(detections), bool) for detections in (reference, other)]
    pairs = []
    for place, row, column in zip(kept.tolist(), rows[kept].tolist(), columns[kept].tolist()):
        if free[0][row] and free[1][column]:
            free[0][row] = free[1][column] = False
            pairs.append(place)

    def count(places: np.ndarray, weights: Optional[np.ndarray] = None) -> np.ndarray:
        return np.bincount(places.astype(np.int64), weights, images)

    taken = reference[rows[pairs], 0]
    objects = count(taken)
    for detections, alone, high_enough in zip((reference, other), free, sure):
        objects = objects + count(detections[alone & high_enough, 0])
    return ImageSums(count(taken, agreed[pairs]), objects)


def _of_one_class(
    first: np.ndarray,
    second: np.ndarray,
    first_sure: Optional[np.ndarray] = None,
    second_sure: Optional[np.ndarray] = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the index pairs of rows that share image and class: two int64 arrays [P], in the order of the rows.

    If ``first_sure`` and ``second_sure`` (bool [M] and [K]) are given, only pairs with at least one confident row are
    returned.
    """
    _, images = np.unique(np.concatenate([first[:, 0], second[:, 0]]), return_inverse=True)
    classes, kinds = np.unique(np.concatenate([first[:, 6], second[:, 6]]), return_inverse=True)
    keys = images * max(len(classes), 1) + kinds
    own, others = keys[: len(first)], keys[len(first) :]
    if first_sure is None or second_sure is None:
        return _equal(own, others)
    # Most of an image's hundreds of rows have scores near 0: pairs of two such rows are skipped to save time.
    weak, high = np.flatnonzero(~first_sure), np.flatnonzero(second_sure)
    sure = np.flatnonzero(first_sure)
    rows, columns = _equal(own[sure], others)
    more_rows, more_columns = _equal(own[weak], others[high])
    rows = np.concatenate([sure[rows], weak[more_rows]])
    columns = np.concatenate([columns, high[more_columns]])
    order = np.lexsort((columns, rows))
    return rows[order], columns[order]


def _equal(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of equal keys, in ``first`` and in ``second``: two int64 arrays [P], ordered by both."""
    order = np.argsort(second, kind="stable")
    ranked = second[order]
    start, end = np.searchsorted(ranked, first, "left"), np.searchsorted(ranked, first, "right")
    counts = end - start
    rows = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, order[np.repeat(start, counts) + within]


def _have_area(detections: np.ndarray) -> np.ndarray:
    """Return which detections have a positive width and height, bool [M]."""
    found: np.ndarray = (detections[:, 3:5] > 0).all(axis=1)
    return found


def _overlaps(
    reference: np.ndarray, other: np.ndarray, rows: np.ndarray, columns: np.ndarray, masks: Optional[MaskPair]
) -> np.ndarray:
    """Return the IoUs of pairs of detections, of their masks if there are any, float64 [P]."""
    boxes = overlaps(_corners(reference[rows]), _corners(other[columns]))
    if masks is None:
        return boxes
    from pycocotools import mask as coco_mask

    found = np.zeros(len(boxes))
    for place in np.flatnonzero(boxes > 0):  # masks whose bounding boxes do not overlap have an IoU of 0
        pair = [masks[0][rows[place]]], [masks[1][columns[place]]]
        found[place] = coco_mask.iou(*pair, [0])[0, 0]
    return found


def _corners(detections: np.ndarray) -> np.ndarray:
    """Return the corners x1, y1, x2, y2 of rows of ``Evaluation.detections``, [M, 4]."""
    return np.column_stack([detections[:, 1:3], detections[:, 1:3] + detections[:, 3:5]])
