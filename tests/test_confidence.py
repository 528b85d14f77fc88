"""Bootstrap of a difference of two mAPs: compared with pycocotools on resampled data, and the derived statements."""

from __future__ import annotations

import contextlib
import io
import math
import time

import numpy as np
import pytest

from act_pipeline.evaluation.coco import match_detections, score_detections
from act_pipeline.evaluation.confidence import MapDifference, map_difference, weighted_map

_SIDE = 640


def coco_of(boxes, images: int, categories: int):
    """Return a pycocotools COCO of boxes given as (image, category, x, y, width, height, iscrowd)."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(images)],
        "categories": [{"id": number, "name": str(number)} for number in range(categories)],
        "annotations": [
            {"id": number + 1, "image_id": int(image), "category_id": int(category), "bbox": list(map(float, box)),
             "area": float(box[2] * box[3]), "iscrowd": int(crowd)}
            for number, (image, category, *box, crowd) in enumerate(boxes)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def truth_of(seed: int, images: int, categories: int, objects: int, crowds: float = 0.05) -> np.ndarray:
    random = np.random.default_rng(seed)
    count = random.poisson(objects, images)
    ids = np.repeat(np.arange(images), count)
    corner, size = random.uniform(0, _SIDE / 2, (len(ids), 2)), random.uniform(8, _SIDE / 2, (len(ids), 2))
    kinds = random.integers(0, categories, len(ids))
    return np.column_stack([ids, kinds, corner, size, random.random(len(ids)) < crowds])


def detections_of(truth: np.ndarray, seed: int, images: int, categories: int, extra: int, noise: float, digits=None):
    """Return detections [M, 7]: most objects, slightly moved, and ``extra`` false ones per image."""
    random = np.random.default_rng(seed)
    found = truth[random.random(len(truth)) < 0.85]
    boxes = found[:, 2:6] + random.normal(0, noise, (len(found), 4)) * found[:, [4, 5, 4, 5]]
    ids = np.repeat(np.arange(images), extra)
    false = np.column_stack([random.uniform(0, _SIDE / 2, (len(ids), 2)), random.uniform(8, _SIDE / 2, (len(ids), 2))])
    kinds = random.integers(0, categories, len(ids))
    scores = np.concatenate([random.beta(3, 2, len(found)), random.beta(1, 6, len(ids))])
    boxes = np.concatenate([boxes, false])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    rows = np.column_stack([np.concatenate([found[:, 0], ids]), boxes, scores, np.concatenate([found[:, 1], kinds])])
    if digits is not None:
        rows[:, 5] = rows[:, 5].round(digits)
        # Equal scores in one image and category would be ordered differently: pycocotools processes copy after copy.
        _, first = np.unique(rows[:, [0, 6, 5]], axis=0, return_index=True)
        rows = rows[np.sort(first)]
    return rows


def resampled(truth: np.ndarray, detections: np.ndarray, counts: np.ndarray, categories: int) -> tuple[float, float]:
    """Return pycocotools' mAP of a data set in which images occur as often as drawn, with distinct ids."""
    ids = np.cumsum(counts) - counts
    boxes, rows = [], []
    for image, count in enumerate(counts):
        for copy in range(count):
            for kept, taken in ((boxes, truth), (rows, detections)):
                part = taken[taken[:, 0] == image].copy()
                part[:, 0] = ids[image] + copy
                kept.append(part)
    coco = coco_of(np.concatenate(boxes), int(counts.sum()), categories)
    return score_detections(coco, np.concatenate(rows), list(range(counts.sum()))).stats["ap"]


@pytest.mark.parametrize(
    ("images", "categories", "digits"),
    [(30, 3, None), (30, 3, 2), (12, 40, None), (60, 1, 2)],  # 40 categories: some are in no drawn image
)
def test_a_weighted_map_is_pycocotools_map_of_the_resampled_data(images, categories, digits):
    truth = truth_of(0, images, categories, 4)
    sides = [detections_of(truth, seed, images, categories, 20, 0.06, digits) for seed in (1, 2)]
    coco = coco_of(truth, images, categories)
    random = np.random.default_rng(5)
    counts = [np.ones(images, int), *random.multinomial(images, np.full(images, 1 / images), 6)]
    matches = [match_detections(coco, rows, list(range(images))) for rows in sides]
    found = weighted_map(matches, np.array(counts, np.float64).T.copy())
    for model, rows in enumerate(sides):
        expected = [resampled(truth, rows, drawn, categories) for drawn in counts]
        assert 0.05 < min(expected) and len(set(expected)) > 4
        np.testing.assert_allclose(found[model], expected, rtol=0, atol=1e-9)


def test_recalls_are_reached_where_pycocotools_reaches_them():
    """Up to 50 of 1 to 120 objects are found; pycocotools' 0.07 and others differ from k / 100 in the last bit."""
    for objects in range(1, 121):
        truth = np.array([(0, 0, 20 * index, 0, 10, 10, 0) for index in range(objects)], float)
        rows = []
        for index in range(objects):  # alternately right and wrong, so that each recall has a different precision
            rows.append((0, 20 * index, 0, 10, 10, 1 - index / 200, 0))
            rows.append((0, 20 * index, 50, 10, 10, 1 - index / 200 - 0.002, 0))
        coco, rows = coco_of(truth, 1, 1), np.array(rows[:100], float)
        scores = score_detections(coco, rows, [0])
        assert weighted_map([scores.matches], np.ones((1, 1)))[0, 0] == pytest.approx(scores.stats["ap"], abs=1e-12)


def test_matches_are_the_same_with_and_without_scores():
    truth = truth_of(3, 10, 2, 5, crowds=0.3)
    rows = detections_of(truth, 4, 10, 2, 30, 0.1)
    coco = coco_of(truth, 10, 2)
    both = score_detections(coco, rows, range(10)).matches, match_detections(coco, rows, range(10))
    assert both[0].image_ids == both[1].image_ids == list(range(10))
    for one, other in zip(*(found.categories for found in both)):
        assert sum(map(len, one.right)) and sum(map(len, one.ignored))
        for name in ("images", "objects"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for name in ("right", "ignored"):
            for first, second in zip(getattr(one, name), getattr(other, name)):
                np.testing.assert_array_equal(first, second)


def matches_of(images: int, categories: int, noises, seed: int = 0, objects: float = 4, extra: int = 10):
    truth = truth_of(seed, images, categories, objects)
    coco = coco_of(truth, images, categories)
    found = [detections_of(truth, seed + 7, images, categories, extra, noise) for noise in noises]
    return [match_detections(coco, rows, list(range(images))) for rows in found]


def test_a_model_against_itself_has_no_doubt():
    one, _ = matches_of(20, 2, (0.05, 0.05))
    found = map_difference(one, one)
    assert (found.difference, found.low, found.high, found.standard_error) == (0, 0, 0, 0)
    assert found.probability(0) == 1.0 and found.tells(0.005) and found.images_needed(0.005) == found.images == 20


def test_a_worse_model_is_known_to_be_worse_and_the_same_seed_says_the_same():
    good, bad = matches_of(60, 2, (0.03, 0.09))
    found, again = map_difference(good, bad), map_difference(good, bad)
    assert found.low < found.difference < found.high < 0
    assert found.resamples == len(found.samples) == 1000 and found.images == 60
    assert found.probability(-found.low) > 0.97 and found.probability(0) == 0.0
    np.testing.assert_array_equal(found.samples, again.samples)
    other = map_difference(good, bad, resamples=200, seed=1)
    assert other.resamples == 200 and other.low != found.low
    assert other.standard_error == pytest.approx(found.standard_error, rel=0.3)


def test_pairing_takes_out_what_is_hard_for_both():
    """The interval is narrower than that of two models scored on independent resamples."""
    before, after = matches_of(40, 2, (0.05, 0.055))
    found = map_difference(before, after)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 400).T.astype(float).copy()
    alone = [weighted_map([model], weights)[0].std() for model in (before, after)]
    assert found.standard_error < 0.7 * math.hypot(*alone)


def test_the_interval_holds_the_difference_as_often_as_it_says():
    """Compared with the difference on 1,800 images, which are split into 30 data sets of 60."""
    truth = truth_of(11, 1800, 1, 3, crowds=0)
    sides = [detections_of(truth, 12, 1800, 1, 3, noise) for noise in (0.05, 0.06)]
    coco = coco_of(truth, 1800, 1)
    whole = [score_detections(coco, rows, range(1800)).stats["ap"] for rows in sides]
    held = 0
    for part in range(30):
        ids = list(range(60 * part, 60 * (part + 1)))
        taken = [rows[np.isin(rows[:, 0], ids)] - [ids[0], 0, 0, 0, 0, 0, 0] for rows in sides]
        found = map_difference(*(match_detections(coco, rows, ids) for rows in taken), resamples=300)
        held += found.low <= whole[1] - whole[0] <= found.high
    assert 24 <= held <= 30  # 28.5 of 30 are expected
    assert found.low > -0.2 and found.high < 0.2


def test_a_smaller_block_draws_the_same(monkeypatch):
    sides = matches_of(20, 3, (0.04, 0.06))
    whole = map_difference(*sides, resamples=100)
    monkeypatch.setattr("act_pipeline.evaluation.confidence._BLOCK", 1)
    np.testing.assert_allclose(map_difference(*sides, resamples=100).samples, whole.samples, rtol=0, atol=1e-12)


def test_draws_without_an_object_are_left_out_and_no_object_at_all_is_none():
    truth = np.array([(0, 0, 0, 0, 10, 10, 0)], float)
    coco = coco_of(truth, 4, 2)
    sides = [match_detections(coco, np.array([(0, 0, 0, 10, 10 + more, 0.9, 0)], float), range(4)) for more in (0, 3)]
    found = map_difference(*sides)
    assert 600 < found.resamples < 750  # 1 - (3/4)**4 = 0.68 of the resamples have the only image with an object
    assert found.difference == pytest.approx(-0.4) and found.standard_error == pytest.approx(0, abs=1e-12)
    empty = match_detections(coco_of(np.zeros((0, 7)), 4, 2), np.array([(0, 0, 0, 9, 9, 0.9, 0)], float), range(4))
    assert map_difference(empty, empty) is None


def test_models_of_different_images_are_not_compared():
    one, other = (matches_of(images, 1, (0.05,))[0] for images in (5, 6))
    with pytest.raises(ValueError, match="different images"):
        map_difference(one, other)


def of_samples(samples, difference=None) -> MapDifference:
    samples = np.asarray(samples, float)
    low, high = np.percentile(samples, [2.5, 97.5])
    mean = float(samples.mean()) if difference is None else difference
    return MapDifference(mean, low, high, float(samples.std(ddof=1)), len(samples), 100, samples)


def test_probability_is_the_share_within_the_drop_and_the_limit_is_within():
    found = of_samples([-0.02, -0.01, -0.005, 0.0, 0.01])
    assert [found.probability(drop) for drop in (0, 0.005, 0.01, 1)] == [0.4, 0.6, 0.8, 1.0]


def test_how_many_images_would_tell():
    samples = np.random.default_rng(0).normal(-0.001, 0.003, 20001)
    found = of_samples(samples, -0.001)
    assert not found.tells(0.005) and found.tells(0.02) and found.tells(-0.01)  # drop < 0.02, gain < 0.01
    needed = found.images_needed(0.005)
    # This requires a standard error of 0.004 / 1.96.
    assert needed == pytest.approx(100 * (1.96 * found.standard_error / 0.004) ** 2, rel=0.01) and needed > 100
    assert found.images_needed(0.005, 0.99) > needed > found.images_needed(0.005, 0.9) >= 100
    assert found.images_needed(0.02) == 100
    assert found.images_needed(0.001) is None  # the drop is exactly the limit


@pytest.mark.slow
def test_coco_takes_seconds(capsys):
    """5,000 images, 80 categories, 300 detections per image, 1,000 resamples of two models."""
    truth = truth_of(0, 5000, 80, 7.3, crowds=0.012)
    sides = [detections_of(truth, seed, 5000, 80, 294, 0.05) for seed in (1, 2)]
    coco = coco_of(truth, 5000, 80)
    matches = [match_detections(coco, rows, list(range(5000))) for rows in sides]
    start, cpu = time.perf_counter(), time.process_time()
    found = map_difference(*matches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    with capsys.disabled():
        print(f"\n{found.resamples} resamples: {seconds:.1f} s, {cpu:.1f} s of CPU: {found}")
    assert found.resamples == 1000 and cpu < 2 * 20  # on two cores
