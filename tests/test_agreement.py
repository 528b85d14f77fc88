"""Agreement of two models' detections: cases worked out by hand, and the one-to-one matching of the analysis."""

from __future__ import annotations

import time

import numpy as np
import pytest

from act_pipeline.evaluation import Agreement, agreement, detection_change
from act_pipeline.evaluation.matching import agreement_of


def rows(*boxes):
    """Return detections given as (image, x, y, width, height, score, class)."""
    return np.array(boxes, np.float64).reshape(-1, 7)


def test_each_box_has_the_best_of_its_image_and_class():
    reference = rows((1, 0, 0, 10, 10, 0.9, 2), (1, 50, 50, 10, 10, 0.3, 2), (2, 0, 0, 10, 10, 0.8, 2))
    other = rows(
        (1, 0, 0, 10, 9, 0.1, 2),  # the best, IoU 0.9, despite its low score
        (1, 0, 0, 10, 6, 0.9, 2),
        (1, 0, 0, 10, 10, 0.9, 3),  # another class
        (3, 0, 0, 10, 10, 0.8, 2),  # another image
        (2, 0, 0, 10, 8, 0.6, 2),
    )
    found = agreement(reference, other)  # a score of 0.3 is not above 0.3
    assert (found.boxes, found.matched) == (2, 1.0)
    assert found.mean_iou == pytest.approx((0.9 + 0.8) / 2)
    assert found.mean_score_change == pytest.approx((0.8 + 0.2) / 2)


def test_what_overlaps_too_little_is_not_matched():
    reference = rows((1, 0, 0, 10, 10, 0.9, 2), (1, 30, 0, 10, 10, 0.9, 2))
    found = agreement(reference, rows((1, 0, 0, 10, 4.9, 0.9, 2), (1, 30, 0, 10, 5, 0.5, 2)))
    assert (found.matched, found.mean_iou, found.mean_score_change) == (0.5, 0.5, pytest.approx(0.4))


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (rows(), rows((1, 0, 0, 1, 1, 0.9, 2)), Agreement(0, None, None, None)),
        (rows((1, 0, 0, 1, 1, 0.9, 2)), rows(), Agreement(1, 0.0, None, None)),
        (rows(), rows(), Agreement(0, None, None, None)),
    ],
)
def test_nothing_to_compare(reference, other, expected):
    assert agreement(reference, other) == expected


def test_the_change_of_nothing_is_none_and_of_what_has_no_partner_is_one():
    one = rows((1, 0, 0, 10, 10, 0.9, 2))
    assert detection_change(one, one) == detection_change(rows(), rows()) == 0.0
    assert detection_change(one, rows()) == detection_change(rows(), one) == 1.0
    assert detection_change(one, rows((1, 0, 0, 10, 5, 0.6, 2))) == pytest.approx(1 - 0.5 * 0.6 / 0.9)
    # An additional box counts like a missing one.
    assert detection_change(one, rows((1, 0, 0, 10, 10, 0.9, 2), (1, 50, 0, 9, 9, 0.4, 2))) == pytest.approx(0.5)


def test_boxes_that_clipping_left_without_an_area_are_no_objects():
    """A model agrees with itself, also where a box lay beyond the edge of the picture."""
    whole = rows((1, 5, 5, 10, 10, 0.9, 2), (1, 64, 5, 0, 10, 0.8, 2), (2, 3, 0, 10, 0, 0.7, 1))
    assert agreement(whole, whole) == Agreement(1, 1.0, 1.0, 0.0)
    assert detection_change(whole, whole) == detection_change(whole[1:], whole[1:]) == 0.0
    assert agreement(whole[1:], whole).boxes == 0


def crowd(seed: int, images: int, count: int, classes: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    total = images * count
    corner, size = random.uniform(0, 400, (total, 2)), random.uniform(20, 150, (total, 2))
    ids = np.repeat(np.arange(images), count)
    return np.column_stack([ids, corner, size, random.beta(0.4, 3, total), random.integers(0, classes, total)])


def moved(detections: np.ndarray, seed: int, pixels: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = detections.copy()
    found[:, 1:5] += random.normal(0, pixels, (len(found), 4))
    found[:, 5] = np.clip(found[:, 5] * random.uniform(0.7, 1.3, len(found)), 0, 1).round(2)  # includes equal scores
    return found[random.permutation(len(found))]


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_the_change_is_what_the_analysis_says_image_by_image(classes):
    first = crowd(0, 12, 80, classes)
    second = moved(first, 1, 6)
    total, objects = 0.0, 0
    for image in range(12):
        sides = [detections[detections[:, 0] == image] for detections in (first, second)]
        outputs = [
            {
                "bbox": np.column_stack([side[:, 6], side[:, 5], side[:, 1:3], side[:, 1:3] + side[:, 3:5]]),
                "bbox_num": np.int32([len(side)]),
            }
            for side in sides
        ]
        agreed, counted = agreement_of(*outputs)
        total, objects = total + agreed, objects + counted
    assert 0.1 < 1 - total / objects < 0.9
    assert detection_change(first, second) == pytest.approx(1 - total / objects, abs=1e-12)


def test_two_hundred_images_take_no_time():
    first = crowd(3, 200, 300, 3)
    second = moved(first, 4, 2)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        detection_change(first, second)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1
