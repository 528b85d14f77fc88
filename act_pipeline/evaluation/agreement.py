"""How far two models detect the same; needs no labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.evaluation.matching import MIN_SCORE, overlaps

MATCHED_IOU = 0.5


@dataclass(frozen=True)
class Agreement:
    """How far a model finds the boxes that another, the reference, is sure of.

    Attributes:
        boxes: of the reference, with a score above 0.3.
        matched: share of them for which the other model has a box of the same class with an IoU of 0.5 or more; None:
            there are no boxes.
        mean_iou: of these boxes with the best of the other model's; None: none is matched.
        mean_score_change: mean absolute difference of the two scores of these; None: none is matched.
    """

    boxes: int
    matched: Optional[float]
    mean_iou: Optional[float]
    mean_score_change: Optional[float]

    def as_record(self) -> dict[str, Any]:
        """Return the fields as ``act.json`` has them."""
        return asdict(self)


def agreement(reference: np.ndarray, other: np.ndarray, min_score: float = MIN_SCORE) -> Agreement:
    """Compare detections with those of a reference, the float model say, on the same images.

    Each box of the reference is compared with the other model's box of its image and class that overlaps it most,
    whatever the other's score; several may have the same.

    Args:
        reference, other: [M, 7] and [K, 7] as ``Evaluation.detections``.
        min_score: boxes of the reference with a higher score are looked at.
    """
    sure = reference[reference[:, 5] > min_score]
    rows, columns = _of_one_class(sure, other)
    iou = overlaps(_corners(sure[rows]), _corners(other[columns]))
    # The best of each row first; lexsort is stable, so of equal ones the first.
    order = np.lexsort((-iou, rows))
    _, first = np.unique(rows[order], return_index=True)
    best = order[first]
    best = best[iou[best] >= MATCHED_IOU]
    if not len(best):
        return Agreement(len(sure), 0.0 if len(sure) else None, None, None)
    change = np.abs(sure[rows[best], 5] - other[columns[best], 5])
    return Agreement(len(sure), len(best) / len(sure), float(iou[best].mean()), float(change.mean()))


def detection_change(reference: np.ndarray, other: np.ndarray, min_score: float = MIN_SCORE) -> float:
    """Return how far detections are from a reference's, in [0, 1]: 0 where all agree, 1 where none has a partner.

    It ranks models on images without labels. It is 1 - the mean, over the objects that either model is sure of, of
    ``iou * min(s, t) / max(s, t)`` with their scores s and t: what
    :func:`act_pipeline.evaluation.matching.agreement_of` gives of all images together, made for many.

    Args:
        reference, other: [M, 7] and [K, 7] as ``Evaluation.detections``, of the same images.
        min_score: an object is one that either model gives this score.
    """
    sure = [detections[:, 5] >= min_score for detections in (reference, other)]
    rows, columns = _of_one_class(reference, other, *sure)
    scores = reference[rows, 5], other[columns, 5]
    high = np.maximum(*scores)
    agreed = overlaps(_corners(reference[rows]), _corners(other[columns]))
    agreed = agreed * np.minimum(*scores) / np.maximum(high, 1e-12)
    kept = np.flatnonzero(agreed > 0)
    kept = kept[np.argsort(-agreed[kept], kind="stable")]
    free = [np.ones(len(detections), bool) for detections in (reference, other)]
    total, pairs = 0.0, 0
    for row, column, value in zip(rows[kept].tolist(), columns[kept].tolist(), agreed[kept].tolist()):
        if free[0][row] and free[1][column]:
            free[0][row] = free[1][column] = False
            total += value
            pairs += 1
    objects = pairs + sum(int((alone & high_enough).sum()) for alone, high_enough in zip(free, sure))
    return 1 - total / objects if objects else 0.0


def _of_one_class(
    first: np.ndarray,
    second: np.ndarray,
    first_sure: Optional[np.ndarray] = None,
    second_sure: Optional[np.ndarray] = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of rows that are of one image and class, int64 [P] each, in the order of the rows.

    ``first_sure`` and ``second_sure``, bool [M] and [K], leave the pairs of which one at least is sure.
    """
    _, images = np.unique(np.concatenate([first[:, 0], second[:, 0]]), return_inverse=True)
    classes, kinds = np.unique(np.concatenate([first[:, 6], second[:, 6]]), return_inverse=True)
    keys = images * max(len(classes), 1) + kinds
    own, others = keys[: len(first)], keys[len(first) :]
    if first_sure is None or second_sure is None:
        return _equal(own, others)
    # Hundreds of rows an image are next to nothing: no pair of two such is made.
    weak, high = np.flatnonzero(~first_sure), np.flatnonzero(second_sure)
    sure = np.flatnonzero(first_sure)
    rows, columns = _equal(own[sure], others)
    more_rows, more_columns = _equal(own[weak], others[high])
    rows = np.concatenate([sure[rows], weak[more_rows]])
    columns = np.concatenate([columns, high[more_columns]])
    order = np.lexsort((columns, rows))
    return rows[order], columns[order]


def _equal(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where keys are equal: int64 [P] places in ``first`` and in ``second``, in the order of both."""
    order = np.argsort(second, kind="stable")
    ranked = second[order]
    start, end = np.searchsorted(ranked, first, "left"), np.searchsorted(ranked, first, "right")
    counts = end - start
    rows = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, order[np.repeat(start, counts) + within]


def _corners(detections: np.ndarray) -> np.ndarray:
    """Return x1, y1, x2, y2 of rows of ``Evaluation.detections``."""
    return np.column_stack([detections[:, 1:3], detections[:, 1:3] + detections[:, 3:5]])
