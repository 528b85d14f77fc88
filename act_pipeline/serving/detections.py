"""What the monitor keeps of the detections of one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from act_pipeline.evaluation.matching import MIN_SCORE
from act_pipeline.serving.histograms import LEAST_SCORE


@dataclass(frozen=True)
class Seen:
    """Classes, scores and sizes of the detections with a score of at least 0.1.

    Attributes:
        classes: int64 [D].
        scores: float64 [D].
        sides: float64 [D], square roots of the boxes' areas, pixels of the original image.
    """

    classes: np.ndarray
    scores: np.ndarray
    sides: np.ndarray

    @classmethod
    def of(cls, detections: np.ndarray) -> Seen:
        """Return what is kept of ``bbox [K, 6]``: class, score, x1, y1, x2, y2; rows of class -1 are ignored."""
        rows = detections[(detections[:, 0] >= 0) & (detections[:, 1] >= LEAST_SCORE)]
        edges = np.clip(rows[:, 4:6] - rows[:, 2:4], 0, None)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1].copy(), np.sqrt(edges.prod(axis=1)))

    @property
    def sure(self) -> np.ndarray:
        """Which detections count as objects: those with a score above 0.3, bool [D]."""
        found: np.ndarray = self.scores > MIN_SCORE
        return found


def joined(parts: list[Seen]) -> Seen:
    """Return the detections of several images together."""
    empty = Seen(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    columns = ("classes", "scores", "sides")
    return Seen(*(np.concatenate([getattr(part, name) for part in [empty, *parts]]) for name in columns))
