"""How sure a difference of two mAPs is: a paired bootstrap over the images.

The images of a data set are a sample of those that a model will see. Drawn from it again and again, with replacement, they
give as many other data sets of the same size; how far the difference of the two models goes up and down over these is how
far chance carries it. Both models are scored on the same draws, so what is hard for both cancels out.

A draw says how often each image is in it. The detections are matched with the objects once, and a draw only weighs them:
its mAP is pycocotools' own of a data set in which the images stand as often as they were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Optional

import numpy as np

from act_pipeline.engines.base import available_cpus
from act_pipeline.evaluation.coco import CategoryMatches, Matches

RESAMPLES = 1000
LEVEL = 0.95
# Numbers in an array at a time: it stays in a processor's cache, and many images take no more memory than few.
_BLOCK = 2_000_000
_RECALLS = np.linspace(0.0, 1.00, 101)  # pycocotools' own: some differ in the last bit from hundredths
_SPACING = np.spacing(1)
# Two figures that are means of the same numbers may differ in their last bits.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class MapDifference:
    """A difference of two models' mAPs (IoU 0.50:0.95) on the same images, and how far chance may carry it.

    Attributes:
        difference: mAP of the other model - mAP of the reference, on the images as they are.
        low, high: the interval that holds 95% of the differences on resampled images (percentiles).
        standard_error: standard deviation of these.
        resamples: how many there were.
        images: in each.
        samples: float64 [resamples], the differences.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    resamples: int
    images: int
    samples: np.ndarray = field(repr=False, compare=False)

    def probability(self, max_drop: float) -> float:
        """Return the share of resamples in which the mAP drops by ``max_drop`` or less."""
        return float((self.samples >= -max_drop - TOLERANCE).mean())

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the lowest and the highest of the middle ``level`` of the differences."""
        low, high = np.percentile(self.samples, [50 * (1 - level), 50 * (1 + level)])
        return float(low), float(high)

    def tells(self, max_drop: float, level: float = LEVEL) -> bool:
        """Return whether the images tell if the drop is within ``max_drop``: the interval lies on one side of it."""
        low, high = self.interval(level)
        return low >= -max_drop - TOLERANCE or high < -max_drop - TOLERANCE

    def images_needed(self, max_drop: float, level: float = LEVEL) -> Optional[int]:
        """Return how many images like these would tell, if the difference stayed what it is; ``images`` if these do.

        The standard error falls with the square root of the number of images. None: no number would, as the drop is
        ``max_drop``.
        """
        if self.tells(max_drop, level):
            return self.images
        margin = abs(self.difference + max_drop)
        if margin <= TOLERANCE:
            return None
        errors = NormalDist().inv_cdf((1 + level) / 2)
        return max(math.ceil(self.images * (errors * self.standard_error / margin) ** 2), self.images + 1)


def map_difference(
    reference: Matches, other: Matches, resamples: int = RESAMPLES, seed: int = 0
) -> Optional[MapDifference]:
    """Return how far another model's mAP is from a reference's, with its interval; None where there is no object.

    Args:
        reference, other: of the same images and categories.
        resamples: how many data sets are drawn.
        seed: of the draws.

    Raises:
        ValueError: they are of different images or categories.
    """
    if reference.image_ids != other.image_ids or len(reference.categories) != len(other.categories):
        raise ValueError("the two models were evaluated on different images")
    images = len(reference.image_ids)
    as_they_are = _differences(reference, other, np.ones((images, 1)))
    if not len(as_they_are):
        return None
    largest = max(max(len(found.objects), *map(len, found.right)) for found in reference.categories)
    size = int(np.clip(_BLOCK // max(images, 2 * largest), 16, resamples))
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, size):
        drawn = random.multinomial(images, np.full(images, 1 / images), min(size, resamples - start))
        parts.append(_differences(reference, other, np.ascontiguousarray(drawn.T, np.float64)))
    samples = np.concatenate(parts)
    found = MapDifference(
        float(as_they_are[0]), 0.0, 0.0, float(samples.std(ddof=1)) if len(samples) > 1 else 0.0, len(samples), images,
        samples,
    )  # fmt: skip
    low, high = found.interval()
    return MapDifference(found.difference, low, high, found.standard_error, len(samples), images, samples)


def _differences(reference: Matches, other: Matches, weights: np.ndarray) -> np.ndarray:
    """Return other - reference of the mAP for each column of ``weights`` [images, B] in which there is an object."""
    before, after = weighted_map([reference, other], weights)
    known = before > -1
    return after[known] - before[known]


def weighted_map(models: Sequence[Matches], weights: np.ndarray) -> np.ndarray:
    """Return mAP at IoU 0.50:0.95 of data sets in which each image stands so many times; -1 where there is no object.

    Where detections of an image and category have equal scores, all copies of the first stand before those of the second.

    Args:
        models: of the same images and categories.
        weights: float64 [images, B], whole numbers from 0.

    Returns:
        float64 [models, B].
    """
    with ThreadPoolExecutor(available_cpus()) as pool:
        by_category = list(
            pool.map(lambda found: _average_precisions(found, weights), zip(*(model.categories for model in models)))
        )
    total = np.zeros((len(models), weights.shape[1]))
    count = np.zeros(weights.shape[1])
    for precisions, there in by_category:
        total += np.where(there, precisions, 0.0)
        count += there
    return np.where(count > 0, total / np.maximum(count, 1), -1.0)


def _average_precisions(models: Sequence[CategoryMatches], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return one category's AP at IoU 0.50:0.95, float64 [models, B], and whether there is an object of it, bool [B]."""
    counts = np.bincount(models[0].objects, minlength=len(weights))
    objects = counts @ weights
    there = objects > 0
    found = np.zeros((len(models), weights.shape[1]))
    if there.any():
        # How many of the 101 recalls are reached with so many objects found, [objects + 1, B].
        reached = np.arange(objects.max() + 1)[:, None] / np.where(there, objects, 1)
        points = np.searchsorted(_RECALLS, reached, side="right").astype(np.float64)
        for row, matches in zip(found, models):
            row[:] = _average_precision(matches, weights, points)
    return found, there


def _average_precision(matches: CategoryMatches, weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return AP at IoU 0.50:0.95, float64 [B]; ``points`` is the number of recalls reached, [objects + 1, B].

    The precision at a recall is the highest there or at a higher one, so it changes only where a detection is right.
    """
    places = np.unique(np.concatenate(matches.right))
    found = np.zeros(weights.shape[1])
    if not len(places):
        return found
    images = matches.images
    counted = np.cumsum(_sums(np.arange(len(images)), places, images, weights), axis=0)
    column = np.arange(weights.shape[1])
    for right, ignored in zip(matches.right, matches.ignored):
        if not len(right):
            continue
        rows = np.searchsorted(places, right)
        shown = counted[rows]
        if len(ignored):
            shown -= np.cumsum(_sums(ignored, places, images, weights), axis=0)[rows]
        hits = np.cumsum(weights[images[right]], axis=0)
        precision = hits / (shown + _SPACING)
        best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        hits *= weights.shape[1]
        hits += column
        recalls = points.ravel().take(hits.astype(np.intp))
        # All recalls below the first are taken with it, 0 too.
        found += best[0] * recalls[0] + np.einsum("ij,ij->j", best[1:], np.diff(recalls, axis=0))
    return found / (len(_RECALLS) * len(matches.right))


def _sums(detections: np.ndarray, places: np.ndarray, images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weights of ``detections`` summed between each of ``places`` and the one before, [places, B]."""
    from scipy import sparse

    segments = np.searchsorted(places, detections)
    shape = (len(places), len(weights))
    return sparse.csr_matrix((np.ones(len(detections)), (segments, images[detections])), shape) @ weights
