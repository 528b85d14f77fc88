#!/usr/bin/env python3
"""Say whether this machine detects what is expected: exit code 0 if it does, 1 if it does not, 2 for an error.

Compares the detections in the bundle's pictures with expected.json. With --coco it also computes the mAP of a data set.
"""

import argparse
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from preprocess import Refused, one_line, read_picture  # noqa: E402
from run import HERE, Detector, add_runtime_flags, load_bundle  # noqa: E402

SURE = 0.3  # boxes with lower scores are not compared
MATCHED = 0.5  # the IoU of one box with its partner
STEPS = np.linspace(0.5, 0.95, 10)
MOST = 100  # detections an image that count for the mAP


def overlaps(first, second, crowd=None):
    """Return the IoU of boxes [M, 4] and [N, 4] (x1, y1, x2, y2), float64 [M, N]; the share of ``first`` in a crowd."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - inside
    if crowd is not None:
        union = np.where(crowd[None], areas[0][:, None], union)
    return inside / np.maximum(union, 1e-12)


def compare(expected, found):
    """Match the sure boxes of two lists of detections [K, 6], each at most once, in both directions.

    Returns:
        the number of boxes that are sure on one side, the IoUs and the differences of the scores of the matched ones.
    """
    expected, found = (np.asarray(rows, np.float64).reshape(-1, 6) for rows in (expected, found))
    iou = overlaps(expected[:, 2:], found[:, 2:]) * (expected[:, :1] == found[:, 0][None])
    free = [np.ones(len(expected), bool), np.ones(len(found), bool)]
    ious, changes = [], []
    for place in np.argsort(-iou, axis=None, kind="mergesort"):
        row, column = np.unravel_index(place, iou.shape)
        if iou[row, column] < MATCHED:
            break
        if free[0][row] and free[1][column] and max(expected[row, 1], found[column, 1]) >= SURE:
            free[0][row] = free[1][column] = False
            ious.append(iou[row, column])
            changes.append(abs(expected[row, 1] - found[column, 1]))
    alone = sum(int((left & (rows[:, 1] >= SURE)).sum()) for left, rows in zip(free, (expected, found)))
    return len(ious) + alone, ious, changes


def check_pictures(detector, expected, limits):
    """Print how the detections of the expected pictures agree; return whether they do."""
    boxes, ious, changes = 0, [], []
    for entry in expected["pictures"]:
        (found,) = detector.detect([read_picture(os.path.join(HERE, entry["file"]))])
        number, near, moved = compare(entry["detections"], found)
        boxes, ious, changes = boxes + number, ious + near, changes + moved
        told = "mean IoU %.4f, largest change of a score %.4f" % (np.mean(near), max(moved)) if near else "none alike"
        print("%s: %d of %d boxes matched, %s" % (entry["file"], len(near), number, told))
    share = len(ious) / max(boxes, 1)
    iou, change = (float(np.mean(values)) if values else None for values in (ious, changes))
    agrees = bool(ious) and share >= limits.min_matched and iou >= limits.min_iou and change <= limits.max_score_change
    figures = "%.3f of the boxes matched (at least %.3f)" % (share, limits.min_matched)
    if ious:
        figures += ", mean IoU %.4f (at least %.3f), mean change of the score %.4f (at most %.3f)"
        figures %= (iou, limits.min_iou, change, limits.max_score_change)
    print("%s %s: %s" % (detector.engine.title, "agrees" if agrees else "DOES NOT AGREE", figures))
    return agrees


def coco_map(detector, annotations, folder, limit):
    """Return the mAP of a data set in COCO's format, as pycocotools computes it, and the number of pictures."""
    with open(annotations, encoding="utf-8") as file:
        data = json.load(file)
    names, categories = detector.bundle["classes"], data["categories"]
    by_name = {category["name"]: category["id"] for category in categories}
    known = all(name in by_name for name in names) and bool(names)
    ids = [by_name[name] for name in names] if known else [category["id"] for category in categories]
    boxes = {}
    for entry in data["annotations"]:
        boxes.setdefault(entry["image_id"], []).append(entry)
    images = sorted(data["images"], key=lambda image: image["id"])[: limit or None]
    found = {}
    for image in images:
        (rows,) = detector.detect([read_picture(os.path.join(folder, image["file_name"]))])
        found[image["id"]] = rows
    scores = []
    for label, category in enumerate(ids):
        per_image = []
        for image in images:
            truth = [entry for entry in boxes.get(image["id"], []) if entry["category_id"] == category]
            rows = found[image["id"]]
            per_image.append((truth, rows[rows[:, 0] == label]))
        scores.append(average_precision(per_image))
    scores = [value for value in scores if value is not None]
    return (float(np.mean(scores)) if scores else -1.0), len(images)


def average_precision(per_image):
    """Return the mean over ten IoUs of the precision at 101 recalls, of one class; None: it has no boxes."""
    real, columns = 0, []
    for truth, rows in per_image:
        truth = sorted(truth, key=lambda entry: bool(entry.get("iscrowd")))
        crowd = np.array([bool(entry.get("iscrowd")) for entry in truth], bool)
        corners = np.array([entry["bbox"] for entry in truth], np.float64).reshape(-1, 4)
        corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        rows = rows[np.argsort(-rows[:, 1], kind="mergesort")][:MOST].astype(np.float64)
        iou = overlaps(rows[:, 2:], corners, crowd)
        real += int((~crowd).sum())
        hit, ignored = (np.zeros((len(STEPS), len(rows)), bool) for _ in range(2))
        for step, least in enumerate(STEPS):
            taken = np.zeros(len(truth), bool)
            for row in range(len(rows)):
                best, place = min(least, 1 - 1e-10), -1
                for column in range(len(truth)):
                    if taken[column] and not crowd[column]:
                        continue
                    if place >= 0 and not crowd[place] and crowd[column]:
                        break
                    if iou[row, column] >= best:
                        best, place = iou[row, column], column
                if place >= 0:
                    taken[place] = hit[step, row] = True
                    ignored[step, row] = crowd[place]
        columns.append((rows[:, 1], hit, ignored))
    if real == 0:
        return None
    order = np.argsort(-np.concatenate([column[0] for column in columns]), kind="mergesort")
    hit, ignored = (np.concatenate([column[place] for column in columns], 1)[:, order] for place in (1, 2))
    values = []
    for right, skipped in zip(hit, ignored):
        true, false = np.cumsum(right & ~skipped), np.cumsum(~right & ~skipped)
        precision = np.concatenate([true / np.maximum(true + false, 1e-12), [0]])
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        values.append(precision[np.searchsorted(true / real, np.linspace(0, 1, 101), side="left")].mean())
    return float(np.mean(values))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--min_matched", type=float, default=0.9, help="share of the boxes that have a partner")
    parser.add_argument("--min_iou", type=float, default=0.9, help="mean IoU of the matched boxes")
    parser.add_argument("--max_score_change", type=float, default=0.05, help="mean change of the matched boxes' scores")
    parser.add_argument("--coco", help="annotations of a data set, whose mAP is computed")
    parser.add_argument("--images", help="folder of the data set's pictures; default: that of the annotations")
    parser.add_argument("--limit", type=int, help="only the first pictures of the data set")
    add_runtime_flags(parser)
    options = parser.parse_args(argv)
    try:
        with open(os.path.join(HERE, "expected.json"), encoding="utf-8") as file:
            expected = json.load(file)
        for flag, path in (("--coco", options.coco), ("--images", options.images)):
            if path and not os.path.exists(path):
                raise Refused("%s: %s does not exist" % (flag, path))
        detector = Detector(load_bundle(), options.runtime, model=options.model)
        agrees = check_pictures(detector, expected, options)
        if options.coco:
            folder = options.images or os.path.dirname(os.path.abspath(options.coco))
            value, number = coco_map(detector, options.coco, folder, options.limit)
            print("mAP %.4f on %d pictures of %s" % (value, number, options.coco))
    except (Refused, OSError, ValueError, KeyError) as error:
        print("error: %s" % one_line(error), file=sys.stderr)
        return 2
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
