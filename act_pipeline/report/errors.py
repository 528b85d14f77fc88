"""What kind of error a detection is: missed, false, wrong class, poor box, by object size.

The kinds and their two thresholds are TIDE's (Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying
Object Detection Errors", ECCV 2020, section 2.2); sizes are COCO's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.evaluation.matching import iou

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
# In the order in which they are shown; the first four are what one asks for first.
KINDS = ("missed", "false", "wrong_class", "poor_box", "wrong_class_poor_box", "duplicate")
SIZES = ("small", "medium", "large")
SMALL_AREA, MEDIUM_AREA = 32.0**2, 96.0**2
_RIGHT, _CROWD = "right", "crowd"


@dataclass(frozen=True)
class Judged:
    """Every detection with what it is; independent of a score threshold, since the surest are matched first.

    Attributes:
        scores: [M] float64.
        kinds: [M] str: ``right``, one of ``KINDS``, or ``crowd`` (in a crowd region, which counts as nothing).
        areas: [M] float64, pixels: of the object that it found or took for another, else of its own box.
        objects: [M] int64: the object (its place among those that are no crowd) that it found, or that a
            ``wrong_class`` or ``poor_box`` covers; -1 for others.
        object_areas: [G] float64, pixels: of all objects.
    """

    scores: np.ndarray
    kinds: np.ndarray
    areas: np.ndarray
    objects: np.ndarray
    object_areas: np.ndarray


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return [N, M] float64: intersection over union of boxes [N, 4] and [M, 4] as x, y, width, height."""
    return iou(corners(first), corners(second))


def corners(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] of x, y, width, height as x1, y1, x2, y2."""
    return np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]])


def _intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, :2] + first[:, None, 2:], second[None, :, :2] + second[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def judge(detections: np.ndarray, boxes: Sequence[Mapping[str, Any]], image_ids: Sequence[int]) -> Judged:
    """Tell for every detection what it is.

    Args:
        detections: [M, 7] as ``Evaluation.detections``.
        boxes: COCO's ``annotations`` entries.
        image_ids: the images that were evaluated, in the order that the detections count.
    """
    truth: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in image_ids}
    for box in boxes:
        if box["image_id"] in truth:
            truth[box["image_id"]].append(box)
    order = np.lexsort((-detections[:, 5], detections[:, 0]))
    ranked = detections[order]
    parts, object_areas, first_object = [], [], 0
    for place, image_id in enumerate(image_ids):
        start, end = np.searchsorted(ranked[:, 0], [place, place + 1])
        objects = [box for box in truth[image_id] if not box["iscrowd"]]
        crowds = [box for box in truth[image_id] if box["iscrowd"]]
        parts.append(_judge_image(ranked[start:end], objects, crowds, first_object))
        object_areas += [float(box["area"]) for box in objects]
        first_object += len(objects)
    columns = [np.concatenate([part[column] for part in parts]) if parts else np.zeros(0) for column in range(4)]
    return Judged(columns[0], columns[1].astype(str), columns[2], columns[3].astype(np.int64), np.array(object_areas))


def _judge_image(
    rows: np.ndarray, objects: Sequence[Mapping[str, Any]], crowds: Sequence[Mapping[str, Any]], first_object: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, kinds, areas, objects of one image's rows, which are sorted by score."""
    truth = np.array([box["bbox"] for box in objects], np.float64).reshape(-1, 4)
    classes = np.array([box["category_id"] for box in objects], np.float64)
    truth_areas = np.array([box["area"] for box in objects], np.float64)
    overlaps = box_iou(rows[:, 1:5], truth)
    same = rows[:, 6][:, None] == classes[None]
    areas = rows[:, 3] * rows[:, 4]
    in_crowd = _in_crowd(rows, crowds, areas)
    taken = np.zeros(len(objects), bool)
    kinds = np.full(len(rows), "wrong_class_poor_box", dtype=object)
    found = np.full(len(rows), -1)
    for index in range(len(rows)):
        own = np.where(same[index], overlaps[index], -1.0)
        free = np.where(taken, -1.0, own)
        if free.size and free.max() >= FOREGROUND_IOU:
            best = int(free.argmax())
            taken[best] = True
            kinds[index], found[index] = _RIGHT, best
            continue
        if in_crowd[index]:
            kinds[index] = _CROWD
            continue
        kinds[index], best = _kind(own, np.where(same[index], -1.0, overlaps[index]))
        if best >= 0:
            found[index] = best
    hit = found >= 0
    areas[hit] = truth_areas[found[hit]]
    found[hit] += first_object
    return rows[:, 5], kinds, areas, found


def _kind(own: np.ndarray, others: np.ndarray) -> tuple[str, int]:
    """Return the kind of a detection that found nothing, and the object that it covers (-1: none).

    Args:
        own: [G] IoU with the objects of its class, -1 for the others.
        others: [G] IoU with the objects of other classes, -1 for its own.
    """
    best_own, best_other = max(own, default=-1.0), max(others, default=-1.0)
    if BACKGROUND_IOU <= best_own < FOREGROUND_IOU:
        return "poor_box", int(own.argmax())
    if best_other >= FOREGROUND_IOU:
        return "wrong_class", int(others.argmax())
    if best_own >= FOREGROUND_IOU:
        return "duplicate", -1
    if best_other < BACKGROUND_IOU:
        return "false", -1
    return "wrong_class_poor_box", -1


def _in_crowd(rows: np.ndarray, crowds: Sequence[Mapping[str, Any]], areas: np.ndarray) -> np.ndarray:
    """Return [M] bool: at least half of the box lies in a crowd region of its class, as COCOeval ignores it."""
    inside = np.zeros(len(rows), bool)
    for crowd in crowds:
        shared = _intersection(rows[:, 1:5], np.array([crowd["bbox"]], np.float64))[:, 0]
        inside |= (shared >= FOREGROUND_IOU * np.maximum(areas, 1e-9)) & (rows[:, 6] == crowd["category_id"])
    return inside


def best_threshold(judged: Judged) -> float:
    """Return the score, in hundredths, from which on the detections have the best F1 (at IoU 0.5, all classes)."""
    counted = judged.kinds != _CROWD
    scores, right = judged.scores[counted], judged.kinds[counted] == _RIGHT
    best, best_f1 = 0.5, 0.0
    for hundredths in range(5, 96):
        shown = scores >= hundredths / 100
        f1 = 2 * int((right & shown).sum()) / max(int(shown.sum()) + len(judged.object_areas), 1)
        if f1 > best_f1:
            best, best_f1 = hundredths / 100, f1
    return best


def count_errors(judged: Judged, threshold: float) -> dict[str, Any]:
    """Count what the detections with at least ``threshold`` are.

    Returns:
        ``objects`` and ``right``, and under ``kinds`` every one of ``KINDS``: each ``all``, ``small``, ``medium``,
        ``large``. An object is ``missed`` if it is not found and no ``wrong_class`` or ``poor_box`` covers it.
    """
    shown = judged.scores >= threshold
    covered = np.zeros(len(judged.object_areas), bool)
    covered[judged.objects[shown & (judged.objects >= 0)]] = True
    counts = {"missed": _by_size(judged.object_areas[~covered])}
    for kind in KINDS[1:]:
        counts[kind] = _by_size(judged.areas[shown & (judged.kinds == kind)])
    return {
        "objects": _by_size(judged.object_areas),
        "right": _by_size(judged.areas[shown & (judged.kinds == _RIGHT)]),
        "kinds": counts,
    }


def _by_size(areas: np.ndarray) -> dict[str, int]:
    small, large = areas < SMALL_AREA, areas >= MEDIUM_AREA
    counts = (len(areas), int(small.sum()), int((~small & ~large).sum()), int(large.sum()))
    return dict(zip(("all", *SIZES), counts))
