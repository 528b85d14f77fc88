"""One-to-one matching of the detections of two models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SCORE = 0.3


@dataclass(frozen=True)
class Matches:
    """Detections of one image, matched one to one.

    Attributes:
        pairs: int64 [P, 2], row indices in the first and the second array, in descending order of agreement.
        iou: float64 [P], IoU of the paired boxes, in (0, 1].
        agreement: float64 [P], ``iou * min(s, t) / max(s, t)`` with the scores s and t.
        missed: int64 [M], unpaired rows of the first array that reach the minimum score.
        added: int64 [A], unpaired rows of the second array that reach the minimum score.
    """

    pairs: np.ndarray
    iou: np.ndarray
    agreement: np.ndarray
    missed: np.ndarray
    added: np.ndarray

    @property
    def counted(self) -> int:
        """The number of objects: pairs, missed and added."""
        return len(self.pairs) + len(self.missed) + len(self.added)


def match(first: np.ndarray, second: np.ndarray, min_score: float = MIN_SCORE, min_iou: float = 0.0) -> Matches:
    """Match the detections of an image greedily, the pair with the highest agreement first.

    Two detections may be paired if they have the same class, their IoU exceeds ``min_iou``, and at least one reaches
    ``min_score``. A score that falls from 0.31 to 0.29 is thus a small change, not a missed object.

    Args:
        first, second: [K, 6]: class, score, x1, y1, x2, y2, see :meth:`act_pipeline.engines.interface.Engine.run`; rows
            of class -1 are ignored.
        min_score: minimum score of a detection that counts.
        min_iou: IoU above which boxes may be paired.
    """
    first, second = np.asarray(first, np.float64).reshape(-1, 6), np.asarray(second, np.float64).reshape(-1, 6)
    overlap = iou(first[:, 2:], second[:, 2:])
    low = np.minimum(first[:, 1:2], second[:, 1])
    high = np.maximum(first[:, 1:2], second[:, 1])
    agreement = overlap * low / np.maximum(high, 1e-12)
    allowed = (first[:, :1] == second[:, 0]) & (first[:, :1] >= 0) & (overlap > min_iou) & (high >= min_score)
    rows, columns = np.nonzero(allowed & (agreement > 0))
    order = np.argsort(-agreement[rows, columns], kind="stable")
    free_first, free_second = np.ones(len(first), bool), np.ones(len(second), bool)
    pairs = []
    for row, column in zip(rows[order], columns[order]):
        if free_first[row] and free_second[column]:
            free_first[row] = free_second[column] = False
            pairs.append((row, column))
    found = np.array(pairs, np.int64).reshape(-1, 2)
    missed = np.flatnonzero(free_first & (first[:, 0] >= 0) & (first[:, 1] >= min_score))
    added = np.flatnonzero(free_second & (second[:, 0] >= 0) & (second[:, 1] >= min_score))
    at = tuple(found.T)
    return Matches(found, overlap[at], agreement[at], missed, added)


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union of all pairs of boxes, float64 [A, B].

    Args:
        first, second: [A, 4] and [B, 4]: x1, y1, x2, y2.
    """
    return overlaps(first[:, None], second[None])


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the element-wise intersection over union of two arrays of boxes.

    Args:
        first, second: [..., 4] (x1, y1, x2, y2), broadcast against each other.

    Returns:
        float64 [...]; 0 where the union is empty.
    """
    width = np.minimum(first[..., 2], second[..., 2]) - np.maximum(first[..., 0], second[..., 0])
    height = np.minimum(first[..., 3], second[..., 3]) - np.maximum(first[..., 1], second[..., 1])
    common = np.asarray(np.clip(width, 0, None) * np.clip(height, 0, None), np.float64)

    def area(boxes: np.ndarray) -> np.ndarray:
        return np.clip(boxes[..., 2] - boxes[..., 0], 0, None) * np.clip(boxes[..., 3] - boxes[..., 1], 0, None)

    union = area(first) + area(second) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def images_of(bbox: np.ndarray, bbox_num: np.ndarray) -> list[np.ndarray]:
    """Split ``bbox`` [sum(bbox_num), 6] into the rows of each image, [K, 6] each."""
    return np.split(np.asarray(bbox), np.cumsum(np.asarray(bbox_num).reshape(-1))[:-1])


def agreement_of(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[float, int]:
    """Return the agreement of two models' detections on a batch.

    The change of the detections is 1 - agreement / objects: 0 if they are identical, 1 if no detection has a partner.

    Args:
        first, second: outputs with ``bbox`` [K, 6] and ``bbox_num`` [N].

    Returns:
        the sum of the pairs' agreements, and the number of objects (pairs, missed and added).
    """
    total, objects = 0.0, 0
    images = zip(images_of(first["bbox"], first["bbox_num"]), images_of(second["bbox"], second["bbox_num"]))
    for one, other in images:
        found = match(one, other)
        total += float(found.agreement.sum())
        objects += found.counted
    return total, objects
