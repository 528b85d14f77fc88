"""Histograms of scores, and how far one is from another (PSI)."""

from __future__ import annotations

import numpy as np

# Detections with lower scores are ignored: DETRs give 300 rows an image, most of them near 0.
LEAST_SCORE = 0.1
SCORE_EDGES = np.linspace(LEAST_SCORE, 1.0, 10)
BIN_NAMES = tuple(f"{low:.1f}-{high:.1f}" for low, high in zip(SCORE_EDGES[:-1], SCORE_EDGES[1:]))
# COCO's limits of small, medium and large objects: sides of a square of the same area, pixels.
SIZE_EDGES = (32.0, 96.0)
SIZE_NAMES = ("small", "medium", "large")
# Added to every bin, so that an empty one gives no infinity.
_PRIOR = 0.5


def score_histogram(scores: np.ndarray) -> np.ndarray:
    """Return the number of scores in each bin of :data:`BIN_NAMES`, int64 [9].

    Args:
        scores: float [D]; those below :data:`LEAST_SCORE` are not counted, those above 1 are in the last bin.
    """
    return np.histogram(np.minimum(scores, 1.0), SCORE_EDGES)[0]


def psi(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the population stability index, ``sum((f - e) ln(f / e))`` over the shares of the bins.

    0 for equal shares; by the usual reading below 0.1 nothing changed, and above 0.25 the distribution is another.

    Args:
        expected, found: counts [B]; one half is added to each bin.
    """
    first, second = np.asarray(expected, np.float64) + _PRIOR, np.asarray(found, np.float64) + _PRIOR
    first, second = first / first.sum(), second / second.sum()
    return float(((second - first) * np.log(second / first)).sum())


def size_shares(sides: np.ndarray) -> dict[str, float]:
    """Return the share of small, medium and large boxes; empty without boxes.

    Args:
        sides: float [D], square roots of the areas, pixels of the original image.
    """
    if not len(sides):
        return {}
    counts = np.bincount(np.searchsorted(SIZE_EDGES, sides, side="right"), minlength=len(SIZE_NAMES))
    return {name: float(count / len(sides)) for name, count in zip(SIZE_NAMES, counts)}
