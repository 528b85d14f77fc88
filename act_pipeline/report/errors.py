"""Error types of detections (missed, false, wrong class, poor box, ...), by object size.

The types and their two thresholds are those of TIDE (Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020, section 2.2). Sizes are COCO's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.evaluation.matching import iou

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
# In display order, the four most informative first.
KINDS = ("missed", "false", "wrong_class", "poor_box", "wrong_class_poor_box", "duplicate")
SIZES = ("small", "medium", "large")
SMALL_AREA, MEDIUM_AREA = 32.0**2, 96.0**2
_RIGHT, _CROWD = "right", "crowd"


@dataclass(frozen=True)
class Judged:
    """The type of every detection, for any score threshold, since detections are matched in descending order of score.

    Attributes:
        scores: float64 [M].
        kinds: str [M]: ``right``, one of ``KINDS``, or ``crowd`` (in a crowd region, counts neither way).
        areas: float64 [M], pixels: of the object that the detection found or covers, otherwise of its own box.
        objects: int64 [M]: index of the object (among those that are no crowd) that the detection found, or that a
            ``wrong_class`` or ``poor_box`` covers; -1 for others.
        object_areas: float64 [G], pixels: of all objects.
    """

    scores: np.ndarray
    kinds: np.ndarray
    areas: np.ndarray
    objects: np.ndarray
    object_areas: np.ndarray


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union of all pairs of boxes, float64 [N, M].

    Args:
        first, second: [N, 4] and [M, 4]: x, y, width, height.
    """
    return iou(corners(first), corners(second))


def corners(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes [N, 4] from x, y, width, height to x1, y1, x2, y2."""
    return np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]])


def _intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, :2] + first[:, None, 2:], second[None, :, :2] + second[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def judge(detections: np.ndarray, boxes: Sequence[Mapping[str, Any]], image_ids: Sequence[int]) -> Judged:
    """Determine the type of every detection.

    Args:
        detections: float64 [M, 7], see ``Evaluation.detections``.
        boxes: COCO's ``annotations`` entries.
        image_ids: COCO ids of the evaluated images; the first column of ``detections`` indexes this list.
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
    """Return scores, kinds, areas and objects of one image's rows, which are sorted by descending score."""
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
    """Return the type of a detection that found no object, and the index of the object that it covers (-1: none).

    Args:
        own: [G], IoU with the objects of its class, -1 for the others.
        others: [G], IoU with the objects of other classes, -1 for its own.
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
    """Return whether at least half of each box is in a crowd region of its class, bool [M]; COCOeval ignores these."""
    inside = np.zeros(len(rows), bool)
    for crowd in crowds:
        shared = _intersection(rows[:, 1:5], np.array([crowd["bbox"]], np.float64))[:, 0]
        inside |= (shared >= FOREGROUND_IOU * np.maximum(areas, 1e-9)) & (rows[:, 6] == crowd["category_id"])
    return inside


def best_threshold(judged: Judged) -> float:
    """Return the score threshold, a multiple of 0.01, with the best F1 (IoU 0.5, all classes together)."""
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
    """Count the types of the detections with a score of at least ``threshold``.

    Args:
        judged: the types of all detections.
        threshold: the minimum score.

    Returns:
        ``objects``, ``right``, and ``kinds`` with an entry for each of ``KINDS``; each has the counts ``all``,
        ``small``, ``medium``, ``large``. An object is ``missed`` if it is not found and no ``wrong_class`` or
        ``poor_box`` covers it.
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
