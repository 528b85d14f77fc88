"""How sure a difference of two mAPs is: a paired bootstrap over the images.

The images of a data set are a sample of those that a model will see. Drawn from it again and again, with replacement,
they give as many other data sets of the same size; how far the difference of the two models goes up and down over these
is how far chance carries it. Both models are scored on the same draws, so what is hard for both cancels out.

A draw says how often each image is in it. The detections are matched with the objects once, and a draw only weighs
them: its mAP is pycocotools' own of a data set in which the images stand as often as they were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Optional

import numpy as np

from act_pipeline.core.cpus import available_cpus
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
        return _interval(self.samples, level)

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
    sides = [_prepared(reference), _prepared(other)]
    as_they_are = _differences(sides, np.ones((images, 1)))
    if not len(as_they_are):
        return None
    largest = max(len(found.objects) for found in reference.categories)
    size = int(np.clip(_BLOCK // max(images, 2 * largest), 16, resamples))
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, size):
        drawn = random.multinomial(images, np.full(images, 1 / images), min(size, resamples - start))
        parts.append(_differences(sides, np.ascontiguousarray(drawn.T, np.float64)))
    samples = np.concatenate(parts)
    low, high = _interval(samples, LEVEL)
    error = float(samples.std(ddof=1)) if len(samples) > 1 else 0.0
    return MapDifference(float(as_they_are[0]), low, high, error, len(samples), images, samples)


def _interval(samples: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _differences(sides: Sequence[Sequence[_Category]], weights: np.ndarray) -> np.ndarray:
    """Return second - first of the mAP for each column of ``weights`` [images, B] in which there is an object."""
    before, after = _weighted_map(sides, weights)
    known = before > -1
    return after[known] - before[known]


def weighted_map(models: Sequence[Matches], weights: np.ndarray) -> np.ndarray:
    """Return mAP at IoU 0.50:0.95 of data sets in which each image stands so many times; -1 where there is no object.

    Where detections of an image and category have equal scores, all copies of the first stand before those of the
    second.

    Args:
        models: of the same images and categories.
        weights: float64 [images, B], whole numbers from 0.

    Returns:
        float64 [models, B].
    """
    return _weighted_map([_prepared(model) for model in models], weights)


class _Category:
    """One category's detections, ready to be weighed: sums over detections as products with the weights of the images.

    The precision at a recall is the highest there or at a higher one, so it changes only where a detection is right:
    ``places`` are these, at any IoU threshold.
    """

    def __init__(self, matches: CategoryMatches, images: int) -> None:
        from scipy import sparse

        def sums(rows: np.ndarray, columns: np.ndarray, count: int) -> Any:
            return sparse.csr_matrix((np.ones(len(columns)), (rows, columns)), (count, images))

        self.objects = sums(np.zeros(len(matches.objects), int), matches.objects, 1)
        places = np.unique(np.concatenate(matches.right))
        segments = np.searchsorted(places, np.arange(len(matches.images)))
        # Row r: the detections after the place before, up to the place r itself.
        self.detections = sums(segments, matches.images, len(places))
        self.thresholds = [
            (np.searchsorted(places, right), matches.images[right], matches.images[ignored],
             np.searchsorted(ignored, right))
            for right, ignored in zip(matches.right, matches.ignored)
        ]  # fmt: skip

    def average_precision(self, weights: np.ndarray, recalls: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Return AP at IoU 0.50:0.95, float64 [B].

        Args:
            weights: float64 [images, B].
            recalls: how many of the recalls are reached with so many objects found, float64 [kinds, objects + 1].
            kinds: the row of ``recalls`` for each column of ``weights``, [B].
        """
        found = np.zeros(weights.shape[1])
        counted = np.cumsum(self.detections @ weights, axis=0)
        starts = (kinds * recalls.shape[1]).astype(np.float64)
        for rows, right, ignored, before in self.thresholds:
            if not len(rows):
                continue
            shown = counted[rows]
            if len(ignored):
                nothing = np.zeros((1, weights.shape[1]))
                shown -= np.concatenate([nothing, np.cumsum(weights[ignored], axis=0)])[before]
            hits = np.cumsum(weights[right], axis=0)
            precision = hits / (shown + _SPACING)
            best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            hits += starts
            reached = recalls.ravel().take(hits.astype(np.intp))
            # Recalls below the first that is reached are taken with it, 0 too.
            found += best[0] * reached[0] + np.einsum("ij,ij->j", best[1:], np.diff(reached, axis=0))
        return found / (len(_RECALLS) * len(self.thresholds))


def _prepared(matches: Matches) -> list[_Category]:
    return [_Category(found, len(matches.image_ids)) for found in matches.categories]


def _weighted_map(models: Sequence[Sequence[_Category]], weights: np.ndarray) -> np.ndarray:
    """Return what :func:`weighted_map` does."""
    total, count = np.zeros((len(models), weights.shape[1])), np.zeros(weights.shape[1])
    with ThreadPoolExecutor(available_cpus()) as pool:
        for precisions, there in pool.map(lambda category: _average_precisions(category, weights), zip(*models)):
            total += np.where(there, precisions, 0.0)
            count += there
    return np.where(count > 0, total / np.maximum(count, 1), -1.0)


def _average_precisions(models: Sequence[_Category], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a category's AP at IoU 0.50:0.95, float64 [models, B], and whether there is an object of it, bool [B]."""
    objects = (models[0].objects @ weights)[0]
    there = objects > 0
    if not there.any():
        return np.zeros((len(models), len(objects))), there
    counts, kinds = np.unique(objects, return_inverse=True)
    reached = np.arange(counts[-1] + 1) / np.maximum(counts, 1)[:, None]
    recalls = np.searchsorted(_RECALLS, reached, side="right").astype(np.float64)
    return np.array([model.average_precision(weights, recalls, kinds) for model in models]), there
