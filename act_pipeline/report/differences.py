"""Pairing of two models' detections, and measures of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.evaluation.detection_rows import outputs_of_rows
from act_pipeline.evaluation.matching import match
from act_pipeline.report.errors import FOREGROUND_IOU

# Detections with scores below this share of the threshold are ignored: RT-DETR outputs hundreds per image.
_WEAKEST_PARTNER = 0.25
HEAT_ROWS, HEAT_COLUMNS = 9, 12


@dataclass(frozen=True)
class Pair:
    """A detection of one or both models on one image.

    Attributes:
        first: float64 [7], a row of ``Evaluation.detections`` of the first model, or None.
        second: the same of the second model.
        iou: IoU of the two boxes; None if one is missing.
    """

    first: np.ndarray | None
    second: np.ndarray | None
    iou: float | None

    def status(self, threshold: float) -> str:
        """Return which models detect it: ``both``, ``lost`` (first only), ``new`` (second only) or ``none``.

        Args:
            threshold: minimum score of a detection.
        """
        before = self.first is not None and self.first[5] >= threshold
        after = self.second is not None and self.second[5] >= threshold
        return {(True, True): "both", (True, False): "lost", (False, True): "new"}.get((before, after), "none")

    def shown(self, threshold: float) -> np.ndarray | None:
        """Return the detection that is shown: the first model's if it has the threshold, else the second's if so."""
        return next((row for row in (self.first, self.second) if row is not None and row[5] >= threshold), None)

    @property
    def matched(self) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Both detections and their IoU; None if one is missing."""
        if self.first is None or self.second is None or self.iou is None:
            return None
        return self.first, self.second, self.iou

    @property
    def difference(self) -> float:
        """The size of the change, in [0, 1]: the change of the score plus the lower score times 1 - IoU.

        For an unpaired detection it is the score.
        """
        matched = self.matched
        if matched is None:
            return _surest(self)
        first, second, iou = matched
        scores = (float(first[5]), float(second[5]))
        return abs(scores[0] - scores[1]) + min(scores) * (1 - iou)


def pair_images(
    first: np.ndarray, second: np.ndarray, image_ids: Sequence[int], threshold: float
) -> dict[int, list[Pair]]:
    """Pair two models' detections image by image.

    Paired detections have the same class and an IoU above 0.5. Those with the highest agreement are paired first, each
    once, see :func:`act_pipeline.evaluation.matching.match`. A detection below the threshold is used only as the
    partner of one above it.

    Args:
        first: float64 [M, 7], see ``Evaluation.detections``.
        second: float64 [K, 7], of the other model.
        image_ids: COCO ids of the evaluated images; the first column of the detections indexes this list.
        threshold: minimum score of a detection that is shown.

    Returns:
        image id -> pairs with at least one score above the threshold, in descending order of score.
    """
    sides = [_by_image(rows[rows[:, 5] >= _WEAKEST_PARTNER * threshold]) for rows in (first, second)]
    nothing = np.zeros((0, 7))
    return {
        image_id: _pair(sides[0].get(place, nothing), sides[1].get(place, nothing), threshold)
        for place, image_id in enumerate(image_ids)
    }


def _by_image(rows: np.ndarray) -> dict[int, np.ndarray]:
    ordered = rows[np.argsort(rows[:, 0], kind="stable")]
    places, starts = np.unique(ordered[:, 0], return_index=True)
    return {int(place): part for place, part in zip(places, np.split(ordered, starts[1:]))} if len(places) else {}


def _pair(first: np.ndarray, second: np.ndarray, threshold: float) -> list[Pair]:
    found = match(outputs_of_rows(first), outputs_of_rows(second), threshold, FOREGROUND_IOU)
    pairs = [Pair(first[row], second[column], float(overlap)) for (row, column), overlap in zip(found.pairs, found.iou)]
    pairs += [Pair(first[row], None, None) for row in found.missed]
    pairs += [Pair(None, second[row], None) for row in found.added]
    return sorted(pairs, key=_surest, reverse=True)


def _surest(pair: Pair) -> float:
    return max(float(row[5]) for row in (pair.first, pair.second) if row is not None)


def summarize(pairs: Mapping[int, Sequence[Pair]], threshold: float) -> dict[str, Any]:
    """Count common and exclusive detections of the two models, and measure how far the common ones differ.

    Args:
        pairs: image id -> pairs, see :func:`pair_images`.
        threshold: minimum score of a detection.

    Returns:
        ``both``, ``lost``, ``new`` (counts); ``mean_iou``, ``median_score_change`` and ``p95_score_change`` of the
        common detections, None without any; ``images_unchanged`` and ``images``.
    """
    everything = [pair for found in pairs.values() for pair in found]
    statuses = [pair.status(threshold) for pair in everything]
    matched = [pair.matched for pair, status in zip(everything, statuses) if status == "both"]
    both = [found for found in matched if found is not None]
    changes = [abs(float(first[5]) - float(second[5])) for first, second, _ in both]
    overlaps = [iou for _, _, iou in both]
    return {
        "both": len(both),
        "lost": statuses.count("lost"),
        "new": statuses.count("new"),
        "mean_iou": float(np.mean(overlaps)) if both else None,
        "median_score_change": float(np.median(changes)) if both else None,
        "p95_score_change": float(np.percentile(changes, 95)) if both else None,
        "images_unchanged": sum(all(pair.status(threshold) == "both" for pair in found) for found in pairs.values()),
        "images": len(pairs),
    }


def most_different(pairs: Mapping[int, Sequence[Pair]], count: int) -> list[tuple[int, float]]:
    """Return (image id, sum of differences) of the images with the largest sums above 0, in descending order.

    Args:
        pairs: image id -> pairs, see :func:`pair_images`.
        count: maximum number of images.
    """
    sums = [(image_id, sum(pair.difference for pair in found)) for image_id, found in pairs.items()]
    return [entry for entry in sorted(sums, key=lambda entry: (-entry[1], entry[0]))[:count] if entry[1] > 0]


def iou_map(
    pairs: Mapping[int, Sequence[Pair]], sizes: Mapping[int, tuple[float, float]], threshold: float
) -> dict[str, Any]:
    """Return the mean IoU of paired boxes over a grid of positions of the box centre in the image.

    Args:
        pairs: image id -> pairs, see :func:`pair_images`; only those detected by both models are used.
        sizes: image id -> width and height in pixels; other images are ignored.
        threshold: minimum score of a detection.

    Returns:
        ``rows``, ``columns``; ``mean_iou`` [rows][columns], None in cells without boxes; ``count`` [rows][columns];
        ``lowest`` and ``highest`` mean IoU, None without boxes.
    """
    sums, counts = np.zeros((HEAT_ROWS, HEAT_COLUMNS)), np.zeros((HEAT_ROWS, HEAT_COLUMNS), int)
    for image_id, found in pairs.items():
        if image_id not in sizes:
            continue
        width, height = sizes[image_id]
        for pair in found:
            matched = pair.matched
            if matched is None or pair.status(threshold) != "both":
                continue
            first, _, iou = matched
            x, y, box_width, box_height = first[1:5]
            row = int(np.clip((y + box_height / 2) / height * HEAT_ROWS, 0, HEAT_ROWS - 1))
            column = int(np.clip((x + box_width / 2) / width * HEAT_COLUMNS, 0, HEAT_COLUMNS - 1))
            sums[row, column] += iou
            counts[row, column] += 1
    means = [
        [round(float(total / count), 4) if count else None for total, count in zip(*line)] for line in zip(sums, counts)
    ]
    filled = [mean for line in means for mean in line if mean is not None]
    return {
        "rows": HEAT_ROWS,
        "columns": HEAT_COLUMNS,
        "mean_iou": means,
        "count": counts.tolist(),
        "lowest": min(filled, default=None),
        "highest": max(filled, default=None),
    }
