"""Error types, pairs, maps and curves, compared with cases worked out by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from inference_fixtures import TinyReader, make_tiny_data
from report_fixtures import make_data

from act_pipeline.core.errors import UserError
from act_pipeline.data.annotations import Annotations
from act_pipeline.evaluation import STAT_NAMES, best_detections, load_detections, save_detections
from act_pipeline.report.curves import score
from act_pipeline.report.differences import HEAT_COLUMNS, HEAT_ROWS, iou_map, most_different, pair_images, summarize
from act_pipeline.report.errors import KINDS, best_threshold, box_iou, count_errors, judge
from act_pipeline.report.figures import heat_map, pr_curve, with_ids


def truth(*boxes, image=1, category=1, crowd=0):
    return [
        {"image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": crowd}
        for box in boxes
    ]  # fmt: skip


def found(box, score=0.9, category=1, image=1):
    return [image - 1, *box, score, category]


OBJECT = (10, 10, 40, 40)
# A box shifted by a third of its width has an IoU of 0.5 with the original; larger shifts give less.
HALF_OFF = (10 + 40 / 3 + 0.1, 10, 40, 40)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (found(OBJECT), "right"), (found(HALF_OFF), "poor_box"), (found((10 + 40 / 3 - 0.1, 10, 40, 40)), "right"),
        (found(OBJECT, category=2), "wrong_class"), (found(HALF_OFF, category=2), "wrong_class_poor_box"),
        (found((200, 200, 10, 10)), "false"), (found((34, 34, 40, 40)), "false"), (found((32, 32, 40, 40)), "poor_box"),  # IoU 0.09, 0.11
    ],
)  # fmt: skip
def test_kinds(row, kind):
    judged = judge(np.array([row], np.float64), truth(OBJECT), [1])
    assert list(judged.kinds) == [kind]
    counts = count_errors(judged, 0.5)
    assert counts["right"]["all"] == (kind == "right")
    # An object covered by a wrong class or a poor box does not count as missed too.
    assert counts["kinds"]["missed"]["all"] == (kind not in ("right", "wrong_class", "poor_box"))
    assert sum(counts["kinds"][name]["all"] for name in KINDS[1:]) == (kind != "right")


def test_the_surest_finds_and_the_others_are_duplicates():
    rows = np.array([found(OBJECT, 0.6), found(OBJECT, 0.8), found(HALF_OFF, 0.9)], np.float64)
    judged = judge(rows, truth(OBJECT), [1])
    assert dict(zip(judged.scores, judged.kinds)) == {0.9: "poor_box", 0.8: "right", 0.6: "duplicate"}
    assert count_errors(judged, 0.7)["kinds"]["duplicate"]["all"] == 0
    # With a threshold above every score the object is missed, and there is no other error.
    assert count_errors(judged, 0.95)["kinds"] == {
        kind: {"all": kind == "missed", "small": 0, "medium": kind == "missed", "large": 0} for kind in KINDS
    }


def test_a_second_object_is_found_by_the_second_box():
    rows = np.array([found(OBJECT, 0.9), found((12, 10, 40, 40), 0.8)], np.float64)
    judged = judge(rows, truth(OBJECT, (14, 10, 40, 40)), [1])
    assert list(judged.kinds) == ["right", "right"] and sorted(judged.objects) == [0, 1]


def test_what_lies_in_a_crowd_counts_as_nothing():
    crowd = truth((100, 100, 100, 100), crowd=1)
    judged = judge(np.array([found((110, 110, 20, 20)), found((190, 190, 40, 40))], np.float64), crowd, [1])
    assert list(judged.kinds) == ["crowd", "false"] and len(judged.object_areas) == 0
    assert count_errors(judged, 0.5)["kinds"]["missed"]["all"] == 0


def test_sizes_are_of_the_object_or_of_the_box_where_there_is_none():
    boxes = truth((0, 0, 31, 31), (100, 100, 32, 32), (200, 200, 96, 96))
    rows = np.array([found((300, 300, 10, 10)), found((400, 400, 50, 50)), found((500, 500, 200, 200))], np.float64)
    counts = count_errors(judge(rows, boxes, [1]), 0.5)
    one_each = {"all": 3, "small": 1, "medium": 1, "large": 1}
    assert counts["objects"] == counts["kinds"]["missed"] == counts["kinds"]["false"] == one_each
    poor = count_errors(judge(np.array([found((0, 0, 31, 90))], np.float64), boxes, [1]), 0.5)
    assert poor["kinds"]["poor_box"] == {"all": 1, "small": 1, "medium": 0, "large": 0}


def test_images_without_detections_are_missed_and_other_images_do_not_count():
    boxes = truth(OBJECT) + truth(OBJECT, image=2) + truth(OBJECT, image=3)
    judged = judge(np.array([found(OBJECT)], np.float64), boxes, [1, 2])
    assert count_errors(judged, 0.5)["kinds"]["missed"]["all"] == 1
    assert count_errors(judge(np.zeros((0, 7)), boxes, [1, 2]), 0.5)["kinds"]["missed"]["all"] == 2
    assert count_errors(judge(np.zeros((0, 7)), [], []), 0.5)["objects"]["all"] == 0


def test_the_threshold_has_the_best_f1():
    boxes = truth(*((50 * place, 0, 40, 40) for place in range(4)))
    right = [found((50 * place, 0, 40, 40), score) for place, score in enumerate((0.9, 0.8, 0.7, 0.305))]
    false = [found((50 * place, 300, 40, 40), 0.4) for place in range(5)]
    # From 0.41: three of three are right; with all detections, four of nine.
    assert best_threshold(judge(np.array(right + false), boxes, [1])) == 0.41
    assert best_threshold(judge(np.array(right), boxes, [1])) == 0.05
    assert best_threshold(judge(np.zeros((0, 7)), boxes, [1])) == 0.5


def test_iou():
    first = np.array([[0, 0, 10, 10], [0, 0, 0, 0]], np.float64)
    second = np.array([[5, 0, 10, 10], [20, 20, 1, 1], [0, 0, 0, 0]], np.float64)
    np.testing.assert_allclose(box_iou(first, second), [[1 / 3, 0, 0], [0, 0, 0]])
    assert box_iou(first, np.zeros((0, 4))).shape == (2, 0)


# --- pairs -----------------------------------------------------------------------------------------------------------


def statuses(first, second, threshold=0.5):
    rows = [np.array(side, np.float64).reshape(-1, 7) for side in (first, second)]
    return [pair.status(threshold) for pair in pair_images(*rows, [1], threshold)[1]]


def test_pairs():
    assert statuses([found(OBJECT)], [found(OBJECT, 0.8)]) == ["both"]
    assert statuses([found(OBJECT)], [found(OBJECT, 0.4)]) == ["lost"]
    assert statuses([found(OBJECT, 0.4)], [found(OBJECT)]) == ["new"]
    assert statuses([found(OBJECT, 0.4)], [found(OBJECT, 0.4)]) == []
    assert statuses([found(OBJECT)], [found(OBJECT, category=2, score=0.8)]) == ["lost", "new"]
    assert statuses([found(OBJECT)], [found(HALF_OFF, 0.8)]) == ["lost", "new"]
    assert statuses([], [found(OBJECT)]) == ["new"] and statuses([], []) == []
    # Two detections on one side: one is paired, the other is not.
    assert statuses([found(OBJECT), found((12, 10, 40, 40), 0.8)], [found(OBJECT)]) == ["both", "lost"]
    # A better-fitting box with a low score takes no partner from a shown one.
    assert statuses([found(OBJECT)], [found(OBJECT, 0.3), found((14, 10, 40, 40), 0.8)]) == ["both"]


def test_differences_add_up_and_rank_images():
    first = np.array([found(OBJECT, 0.9), found(OBJECT, 0.9, image=2), found(OBJECT, 0.9, image=3)])
    second = np.array([found(OBJECT, 0.7), found((15, 10, 40, 40), 0.9, image=2)])
    pairs = pair_images(first, second, [1, 2, 3, 4], 0.5)
    iou = 35 / 45
    ranked = dict(most_different(pairs, 10))
    assert list(ranked) == [3, 1, 2]
    assert list(ranked.values()) == pytest.approx([0.9, 0.2, 0.9 * (1 - iou)])
    assert [image for image, _ in most_different(pairs, 2)] == [3, 1]
    summary = summarize(pairs, 0.5)
    assert {key: summary[key] for key in ("both", "lost", "new", "images_unchanged", "images")} == {
        "both": 2, "lost": 1, "new": 0, "images_unchanged": 3, "images": 4,
    }  # fmt: skip
    assert summary["mean_iou"] == pytest.approx((1 + iou) / 2)
    assert summary["median_score_change"] == pytest.approx(0.1)


def test_the_map_has_the_iou_where_the_box_is():
    first = np.array([found((0, 0, 10, 10)), found((90, 80, 10, 10))])
    second = np.array([found((0, 0, 10, 10)), found((90, 80, 10, 8))])
    grid = iou_map(pair_images(first, second, [1], 0.5), {1: (100.0, 90.0)}, 0.5)
    assert (grid["rows"], grid["columns"]) == (HEAT_ROWS, HEAT_COLUMNS)
    assert grid["mean_iou"][0][0] == 1 and grid["mean_iou"][-1][-1] == pytest.approx(0.8)
    assert sum(map(sum, grid["count"])) == 2 and (grid["lowest"], grid["highest"]) == (pytest.approx(0.8), 1)
    assert sum(mean is not None for line in grid["mean_iou"] for mean in line) == 2


# --- curves ----------------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_an_evaluation(tmp_path):
    """The stored detections give the measured mAP, and curves whose mean equals it."""
    from act_pipeline.evaluation import evaluate

    annotations = make_tiny_data(tmp_path / "data", images=4)
    rng = np.random.default_rng(3)

    class Engine:
        name, precision, device, threads = "scripted", "fp32", "CPU", 1

        def run(self, inputs):
            height, width = (inputs["im_shape"] / inputs["scale_factor"])[0]
            boxes = [
                [index % 2, rng.uniform(), *(np.array([0.25, 0.25, 0.75, 0.625]) + rng.normal(0, 0.05, 4))]
                for index in range(8)
            ]  # fmt: skip
            rows = np.float32(boxes) * np.float32([1, 1, width, height, width, height])
            return {"bbox": rows, "bbox_num": np.int32([8])}

    evaluation = evaluate(Engine(), TinyReader(annotations, annotations.parent / "images"), progress=False)
    save_detections(tmp_path / "d.npz", {"fp32": evaluation}, dict.fromkeys(evaluation.image_ids, "a.png"))
    rows = load_detections(tmp_path / "d.npz").rows["fp32"]
    scores = score(Annotations.load(annotations, "test"), rows, [100, 101, 102, 103])
    assert 0.05 < evaluation.map < 0.95
    for name in STAT_NAMES:
        expected = evaluation.stats[name] if evaluation.stats[name] >= 0 else None
        assert scores.stats[name] == expected, name
    assert scores.per_class == {"disc": pytest.approx(evaluation.per_class["disc"]), "square": None}
    assert np.mean(scores.curves["0.50"]) == pytest.approx(evaluation.map50, abs=1e-4)
    assert scores.class_curves["square"] is None and len(scores.class_curves["disc"]) == 101


def test_nothing_found_scores_zero(tmp_path):
    reader = make_data(tmp_path)
    scores = score(reader.annotations(), np.zeros((0, 7)), [40, 41])
    assert scores.stats["ap"] == 0 and set(scores.curves["0.75"]) == {0.0}


def test_masks_are_scored_where_a_model_gives_them(tmp_path):
    """The box is exact, but the mask is only its left half: IoU 0.5, so nothing above IoU 0.50."""
    from pycocotools import mask as coco_mask

    square = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    square["segmentation"] = [[10, 10, 50, 10, 50, 50, 10, 50]]
    images = [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}]
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": [square], "categories": [{"id": 1, "name": "square"}]})
    )
    half = np.zeros((64, 64), np.uint8, order="F")
    half[10:50, 10:32] = 1
    mask = coco_mask.encode(half)
    mask["counts"] = mask["counts"].decode()
    annotations, rows = Annotations.load(path, "test"), np.array([found(OBJECT)], np.float64)
    boxes, masks = score(annotations, rows, [1]), score(annotations, rows, [1], [mask])
    assert boxes.stats["ap75"] == pytest.approx(1) and masks.stats["ap75"] == 0
    assert masks.stats["ap50"] == pytest.approx(1) and set(masks.curves["0.75"]) == {0.0}


# --- detections on disk ----------------------------------------------------------------------------------------------


def saved(path, image_ids=(3, 7), **rows):
    """Save detections, and return them as read again."""
    evaluations = {
        name: SimpleNamespace(detections=array, image_ids=list(image_ids), masks=None) for name, array in rows.items()
    }
    save_detections(path, evaluations, {number: f"{number}.jpg" for number in image_ids})
    return load_detections(path)


def test_the_best_hundred_of_an_image_and_category_are_kept():
    rng = np.random.default_rng(0)
    images, kinds = np.repeat([1.0, 0.0], 450), np.tile([5.0, 6.0, 5.0], 300)
    rows = np.column_stack([images, rng.uniform(0, 99, (900, 4)), rng.uniform(size=900).round(2), kinds])
    kept = best_detections(rows)
    assert len(kept) == 400 and list(kept[[0, -1], 0]) == [0, 1]
    for image in (0, 1):
        assert (np.diff(kept[kept[:, 0] == image, 5]) <= 0).all()
        for kind in (5, 6):
            own = rows[(rows[:, 0] == image) & (rows[:, 6] == kind)]
            # Of equal scores the first are kept, in their order.
            expected = own[np.argsort(-own[:, 5], kind="stable")][:100]
            np.testing.assert_array_equal(kept[(kept[:, 0] == image) & (kept[:, 6] == kind)], expected)


def test_what_engines_give_is_kept_to_the_bit_in_half_the_bytes(tmp_path):
    rng = np.random.default_rng(1)
    corners = np.sort(rng.uniform(0, 640, (200, 2, 2)), axis=1).reshape(200, 4).astype(np.float32).astype(np.float64)
    corners[0, 0] = np.float32(1e-30)  # a difference that is not exact in float64
    rows = np.column_stack(
        [
            np.repeat([0, 1], 100),
            corners[:, :2],
            corners[:, 2:] - corners[:, :2],
            rng.random(200, np.float32),
            np.ones(200),
        ]
    )
    read = saved(tmp_path / "d.npz", fp32=rows, int8=rows + [0, 1e-9, 0, 0, 0, 0, 0])
    with np.load(tmp_path / "d.npz") as content:
        assert (content["fp32"].dtype, content["int8"].dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(read.rows["fp32"], best_detections(rows))
    np.testing.assert_array_equal(read.rows["int8"], best_detections(rows + [0, 1e-9, 0, 0, 0, 0, 0]))
    assert read.image_ids == [3, 7]


@pytest.mark.parametrize("digits", [None, 1])
def test_what_is_kept_has_the_same_scores(tmp_path, digits):
    """With more than 100 detections per image, and equal scores."""
    from test_confidence import coco_of, detections_of, truth_of

    from act_pipeline.evaluation.coco import score_detections

    truth = truth_of(0, 6, 3, 8)
    rows = detections_of(truth, 1, 6, 3, 450, 0.06)
    if digits is not None:
        rows[:, 5] = rows[:, 5].round(digits)
    coco, ids = coco_of(truth, 6, 3), list(range(6))
    kept = saved(tmp_path / "d.npz", ids, int8=rows[np.random.default_rng(2).permutation(len(rows))]).rows["int8"]
    again = saved(tmp_path / "d.npz", ids, int8=rows).rows["int8"]
    before, after = score_detections(coco, rows, ids), score_detections(coco, again, ids)
    assert len(again) < len(rows) and 0.1 < before.stats["ap"] < 0.9
    assert (after.stats, after.per_category, after.summary) == (before.stats, before.per_category, before.summary)
    assert (score_detections(coco, kept, ids).stats == before.stats) == (
        digits is None
    )  # the order of equal scores matters


def test_ids_are_exact_whatever_their_size(tmp_path):
    ids = [-(2**62), -1, 0, 2**53, 2**53 + 1, 2**63 - 1]
    rows = np.column_stack([np.arange(6), np.full((6, 4), 2), np.full(6, 0.5), np.ones(6)]).astype(float)
    read = saved(tmp_path / "d.npz", ids, int8=rows, fp32=rows[:2])
    assert read.image_ids == ids and all(type(number) is int for number in read.image_ids)
    np.testing.assert_array_equal(read.rows["int8"], rows)
    np.testing.assert_array_equal(read.rows["fp32"], rows[:2])


def test_evaluations_of_different_images_lie_beside_each_other(tmp_path):
    one = np.array([[0, 1, 1, 2, 2, 0.5, 1], [1, 1, 1, 2, 2, 0.25, 1]], float)
    evaluations = {
        "fp32": SimpleNamespace(detections=one, image_ids=[5, 9], masks=None),
        "int8": SimpleNamespace(detections=one, image_ids=[7, 9], masks=None),
    }
    save_detections(tmp_path / "d.npz", evaluations, {5: "a", 7: "b", 9: "c"})
    read = load_detections(tmp_path / "d.npz")
    assert read.image_ids == [5, 7, 9]
    assert [list(rows[:, 0]) for rows in read.rows.values()] == [[0, 2], [1, 2]]


def test_images_are_known_by_id_and_file_name(tmp_path):
    read = saved(tmp_path / "d.npz", (3, 7, 8), int8=np.zeros((0, 7)))
    assert read.known({3: "3.jpg", 7: "another.jpg", 9: "8.jpg", 8: "8.jpg"}) == [3, 8] and read.known({}) == []


def test_nothing_is_kept_as_nothing(tmp_path):
    assert saved(tmp_path / "d.npz", fp32=np.zeros((0, 7))).rows["fp32"].shape == (0, 7)


def test_what_is_no_detections_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"d\.npz is missing"):
        load_detections(tmp_path / "d.npz")
    for content in (b"", b"no zip", json.dumps({}).encode()):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(UserError, match="holds no detections"):
            load_detections(tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", fp32=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="holds no detections"):
        load_detections(tmp_path / "d.npz")
    images = {"image_ids": np.int64([3, 7]), "image_names": np.uint32([1, 2])}
    valid = np.array([[1, 1, 1, 2, 2, 0.5, 4]])
    np.savez(tmp_path / "d.npz", fp32=valid, **images)
    np.testing.assert_array_equal(load_detections(tmp_path / "d.npz").rows["fp32"], valid)
    for array in (np.zeros((3, 6)), np.full((1, 7), np.nan), valid + 1, valid - [2, 0, 0, 0, 0, 0, 0], valid + 0.5):
        np.savez(tmp_path / "d.npz", fp32=array, **images)
        with pytest.raises(UserError, match=r"fp32 is \[\d, \d\], expected finite rows of 7"):
            load_detections(tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", fp32=valid)
    with pytest.raises(UserError, match="lacks image_ids or image_names, an earlier version wrote it; delete it"):
        load_detections(tmp_path / "d.npz")
    for name, array in (
        ("image_ids", np.int64([7, 3])), ("image_ids", np.float64([3, 7])), ("image_ids", np.int64([[3, 7]])),
        ("image_ids", np.int64([3])), ("image_names", np.int64([3, 7])),
    ):  # fmt: skip
        np.savez(tmp_path / "d.npz", fp32=valid, **{**images, name: array})
        with pytest.raises(UserError, match="image_ids or image_names is damaged"):
            load_detections(tmp_path / "d.npz")


# --- charts ----------------------------------------------------------------------------------------------------------


def test_charts_take_the_pages_colours_and_letters():
    words = {"recall": "召回率", "precision": "精确率", "mean_iou": "平均 IoU"}
    grid = {"mean_iou": [[0.9, None], [0.95, 1.0]]}
    for drawing in (pr_curve([0, 0.5, 1], [1, 0.9, 0], [1, 0.8, 0], words), heat_map(grid, words)):
        assert drawing.startswith("<svg viewBox=") and drawing.endswith("</svg>")
        assert "#0102" not in drawing and "var(--muted)" in drawing
        assert "http" not in drawing and "<style" not in drawing and "DejaVu" not in drawing
        assert any(word in drawing for word in words.values())
    renamed = with_ids(drawing, "c1-")
    assert 'id="c1-' in renamed and renamed.count('id="') == renamed.count('id="c1-')
