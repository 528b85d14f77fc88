"""Confidence of a difference of two models, of their mAPs or detections: a paired bootstrap over the images.

The images of a data set are a sample of those that a model will see. Resampling it with replacement yields other data
sets of the same size; the spread of the difference over these is its sampling error. Both models are scored on the same
resamples, so images that are hard for both cancel out.

A resample is a count per image. Detections are matched with the objects once; a resample only weights them. The
resulting mAP equals that of pycocotools on a data set in which every image occurs as often as it was drawn.
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
from act_pipeline.evaluation.agreement import ImageSums
from act_pipeline.evaluation.coco import CategoryMatches, Matches

RESAMPLES = 1000
LEVEL = 0.95
# Elements per array: keeps the blocks in the CPU cache and bounds the memory for any number of images.
_BLOCK = 2_000_000
_RECALLS = np.linspace(0.0, 1.00, 101)  # as in pycocotools; some differ from k / 100 in the last bit
_SPACING = np.spacing(1)
# Two means of the same numbers may differ in their last bits.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Difference:
    """Difference of a model from a reference on the same images, with its bootstrap distribution.

    Attributes:
        difference: figure of the other model - figure of the reference, on the original images.
        low, high: bounds of the percentile interval that contains 95% of the resampled differences.
        standard_error: standard deviation of the resampled differences.
        resamples: number of resamples.
        images: number of images in each resample.
        samples: float64 [resamples], the resampled differences.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    resamples: int
    images: int
    samples: np.ndarray = field(repr=False, compare=False)

    def probability(self, max_drop: float) -> float:
        """Return the share of resamples in which the figure drops by at most ``max_drop``."""
        return float((self.samples >= -max_drop - TOLERANCE).mean())

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the bounds of the central percentile interval that contains ``level`` of the resampled differences."""
        return _interval(self.samples, level)

    def tells(self, max_drop: float, level: float = LEVEL) -> bool:
        """Return whether the images decide if the drop is within ``max_drop``: the interval lies on one side of it."""
        low, high = self.interval(level)
        return low >= -max_drop - TOLERANCE or high < -max_drop - TOLERANCE

    def images_needed(self, max_drop: float, level: float = LEVEL) -> Optional[int]:
        """Return how many similar images would decide if the drop is within ``max_drop``, at the present difference.

        The standard error is assumed to fall with the square root of the number of images.

        Args:
            max_drop: the allowed drop.
            level: confidence level of the interval.

        Returns:
            the number of images; ``images`` if the present ones decide it; None if no number would, because the drop
            equals ``max_drop``.
        """
        if self.tells(max_drop, level):
            return self.images
        margin = abs(self.difference + max_drop)
        if margin <= TOLERANCE:
            return None
        errors = NormalDist().inv_cdf((1 + level) / 2)
        return max(math.ceil(self.images * (errors * self.standard_error / margin) ** 2), self.images + 1)


class MapDifference(Difference):
    """Difference of two models' mAPs (IoU 0.50:0.95) on the same images."""


class AgreementLoss(Difference):
    """Agreement of two models' detections - 1, the agreement of the reference with itself.

    The agreement is 1 minus :func:`act_pipeline.evaluation.agreement.detection_change`.
    """

    @property
    def agreement(self) -> float:
        """The agreement on the original images, in [0, 1]."""
        return 1 + self.difference


class MiouDifference(Difference):
    """Difference of two models' mean IoUs of the masks of the same objects."""


def agreement_loss(sums: ImageSums, resamples: int = RESAMPLES, seed: int = 0) -> Optional[AgreementLoss]:
    """Return the agreement of two models - 1 with its bootstrap interval.

    Args:
        sums: the sums of each image.
        resamples: number of bootstrap resamples; those without an object are left out.
        seed: of the random draws.

    Returns:
        the difference from perfect agreement; None if neither model detects an object.
    """
    if not sums.objects.sum():
        return None
    return AgreementLoss(*_mean_of_objects(sums.agreed, sums.objects, -1.0, resamples, seed))


def miou_difference(
    reference: ImageSums, other: ImageSums, resamples: int = RESAMPLES, seed: int = 0
) -> Optional[MiouDifference]:
    """Return another model's mean IoU - a reference's with its bootstrap interval.

    Args:
        reference, other: sums of both models over the same objects, see
            :func:`act_pipeline.evaluation.masks.mask_sums`.
        resamples, seed: see :func:`agreement_loss`.

    Returns:
        the difference; None if there is no object.
    """
    if not reference.objects.sum():
        return None
    return MiouDifference(*_mean_of_objects(other.agreed - reference.agreed, reference.objects, 0.0, resamples, seed))


def _mean_of_objects(
    values: np.ndarray, objects: np.ndarray, offset: float, resamples: int, seed: int
) -> tuple[float, float, float, float, int, int, np.ndarray]:
    """Return the fields of a :class:`Difference`: the mean over all objects + an offset, with its bootstrap interval.

    Args:
        values: float64 [images], sum over the objects of each image.
        objects: int64 [images], their numbers, not all 0.
        offset: is added.
        resamples, seed: see :func:`agreement_loss`.
    """
    images = len(objects)
    random = np.random.default_rng(seed)
    size = int(np.clip(_BLOCK // images, 16, resamples))
    parts = []
    for start in range(0, resamples, size):
        drawn = random.multinomial(images, np.full(images, 1 / images), min(size, resamples - start))
        counts = drawn @ objects
        there = counts > 0
        parts.append((drawn @ values)[there] / counts[there] + offset)
    samples = np.concatenate(parts)
    low, high = _interval(samples, LEVEL)
    error = float(samples.std(ddof=1)) if len(samples) > 1 else 0.0
    return float(values.sum()) / int(objects.sum()) + offset, low, high, error, len(samples), images, samples


def map_difference(
    reference: Matches, other: Matches, resamples: int = RESAMPLES, seed: int = 0
) -> Optional[MapDifference]:
    """Return another model's mAP - a reference's mAP with its bootstrap interval.

    Args:
        reference, other: matches of the same images and categories.
        resamples: number of bootstrap resamples.
        seed: of the random draws.

    Returns:
        the difference; None if the images have no ground-truth object.

    Raises:
        ValueError: the images or categories differ.
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
    """Return second - first mAP for each column of ``weights`` [images, B] that contains an object."""
    before, after = _weighted_map(sides, weights)
    known = before > -1
    return after[known] - before[known]


def weighted_map(models: Sequence[Matches], weights: np.ndarray) -> np.ndarray:
    """Return the mAP at IoU 0.50:0.95 of data sets in which each image occurs a given number of times.

    For detections of one image and category with equal scores, all copies of the first precede those of the second.

    Args:
        models: matches of the same images and categories.
        weights: float64 [images, B], integers from 0.

    Returns:
        float64 [models, B]; -1 where there is no object.
    """
    return _weighted_map([_prepared(model) for model in models], weights)


class _Category:
    """One category's detections as sparse matrices, so that sums over detections are products with the image weights.

    The interpolated precision at a recall is the highest at this or a higher recall, so it changes only at true
    positives: ``places`` are the positions of these at any IoU threshold.
    """

    def __init__(self, matches: CategoryMatches, images: int) -> None:
        from scipy import sparse

        def sums(rows: np.ndarray, columns: np.ndarray, count: int) -> Any:
            return sparse.csr_matrix((np.ones(len(columns)), (rows, columns)), (count, images))

        self.objects = sums(np.zeros(len(matches.objects), int), matches.objects, 1)
        places = np.unique(np.concatenate(matches.right))
        segments = np.searchsorted(places, np.arange(len(matches.images)))
        # Row r sums the detections after places[r - 1] up to and including places[r].
        self.detections = sums(segments, matches.images, len(places))
        self.thresholds = [
            (np.searchsorted(places, right), matches.images[right], matches.images[ignored],
             np.searchsorted(ignored, right))
            for right, ignored in zip(matches.right, matches.ignored)
        ]  # fmt: skip

    def average_precision(self, weights: np.ndarray, recalls: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Return the AP at IoU 0.50:0.95, float64 [B].

        Args:
            weights: float64 [images, B].
            recalls: float64 [kinds, objects + 1], how many of the recall thresholds are reached with so many objects
                found.
            kinds: int [B], the row of ``recalls`` for each column of ``weights``.
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
            # The first true positive also covers all lower recall thresholds, including 0.
            found += best[0] * reached[0] + np.einsum("ij,ij->j", best[1:], np.diff(reached, axis=0))
        return found / (len(_RECALLS) * len(self.thresholds))


def _prepared(matches: Matches) -> list[_Category]:
    return [_Category(found, len(matches.image_ids)) for found in matches.categories]


def _weighted_map(models: Sequence[Sequence[_Category]], weights: np.ndarray) -> np.ndarray:
    """Compute :func:`weighted_map` from prepared categories."""
    total, count = np.zeros((len(models), weights.shape[1])), np.zeros(weights.shape[1])
    with ThreadPoolExecutor(available_cpus()) as pool:
        for precisions, there in pool.map(lambda category: _average_precisions(category, weights), zip(*models)):
            total += np.where(there, precisions, 0.0)
            count += there
    return np.where(count > 0, total / np.maximum(count, 1), -1.0)


def _average_precisions(models: Sequence[_Category], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a category's AP at IoU 0.50:0.95, float64 [models, B], and whether it has an object, bool [B]."""
    objects = (models[0].objects @ weights)[0]
    there = objects > 0
    if not there.any():
        return np.zeros((len(models), len(objects))), there
    counts, kinds = np.unique(objects, return_inverse=True)
    reached = np.arange(counts[-1] + 1) / np.maximum(counts, 1)[:, None]
    recalls = np.searchsorted(_RECALLS, reached, side="right").astype(np.float64)
    return np.array([model.average_precision(weights, recalls, kinds) for model in models]), there
