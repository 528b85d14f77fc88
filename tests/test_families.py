"""Detector families: which one a model is of, and its detections from raw outputs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.core.errors import UserError
from act_pipeline.families.interface import Geometry, PostProcess
from act_pipeline.families.nms import best_pairs, multiclass_nms
from act_pipeline.families.registry import FAMILIES, Decoder, family_named, find_family

WHERE = Path("model")


def shapes_of(*shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"output{index}": shape for index, shape in enumerate(shapes)}


@pytest.mark.parametrize(
    "shapes, family",
    [
        (shapes_of((-1, 6), (-1,)), "rtdetr"),
        (shapes_of((), ()), "rtdetr"),  # shapes that a file does not state
        (shapes_of((-1, 300, 80), (-1, 300, 4)), "detr_raw"),
        ({"pred_boxes": (1, 300, 4), "logits": (1, 300, 4)}, "detr_raw"),
        (shapes_of((-1, 8400, 4), (-1, 80, 8400)), "ppyoloe"),
        (shapes_of((-1, 84, 8400)), "yolo"),
        (shapes_of((1, 25200, 85)), "yolo"),
        (shapes_of((1, 25200, 6)), "yolo"),  # one class
        (shapes_of((1, 300, 6)), "end2end"),
    ],
)
def test_outputs_decide_the_family(shapes: dict[str, tuple[int, ...]], family: str) -> None:
    assert find_family(shapes, WHERE).name == family
    assert find_family(shapes, WHERE, "DETR").name == family  # what PaddleDetection writes does not contradict
    assert find_family(shapes, WHERE, family).name == family


@pytest.mark.parametrize("shapes", [{}, shapes_of((1, 84)), shapes_of((1, 3, 80, 80, 85)), shapes_of((-1, 5), (-1,))])
def test_outputs_of_no_detector_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=r"expected bbox \[K, 6\] and bbox_num \[N\]"):
        find_family(shapes, WHERE)


def test_a_family_that_does_not_fit_is_refused_and_the_fitting_one_named() -> None:
    with pytest.raises(UserError, match="family yolo has .*; end2end fits"):
        find_family(shapes_of((1, 300, 6)), WHERE, "yolo")


@pytest.mark.parametrize(
    ("shape", "family"),
    [((-1, 7, 8400), "yolo"), ((1, 84, 8400), "yolo"), ((1, 300, 6), "end2end"), ((1, 100, 6), "end2end")],
)
def test_arrays_of_other_families_are_not_ppyoloes(shape: tuple[int, ...], family: str) -> None:
    with pytest.raises(UserError, match=f"family ppyoloe has .*; {family} fits"):
        find_family(shapes_of(shape), WHERE, "ppyoloe")


@pytest.mark.parametrize("shape", [(1, 8400, 6), (-1, -1, 7), (1, 84, 6)])
def test_one_array_of_ppyoloe(shape: tuple[int, ...]) -> None:
    family = find_family({"both": shape}, WHERE, "ppyoloe")
    assert family.name == "ppyoloe"
    raw = family.raw({"both": shape}, 2)
    assert (raw.scores.start, raw.boxes.end) == (4, 4)


def test_outputs_of_no_family_are_described_in_a_short_line() -> None:
    shapes = {f"save_infer_model/scale_{index}.tmp_0": (-1, 5, 80, 80, 85) for index in range(9)}
    with pytest.raises(
        UserError, match=r"gives \[N, 5, 80, 80, 85\], .* and 3 more, expected .*docs/import.md"
    ) as error:
        find_family(shapes, WHERE)
    line = str(error.value)
    assert "save_infer_model" not in line and len(line) < 420
    assert all(family.name in line for family in FAMILIES[1:])
    with pytest.raises(UserError) as error:
        find_family(shapes_of((1, 84)), WHERE)
    assert len(str(error.value)) < 320


def test_paddleslims_names_select_families() -> None:
    assert [family_named(name, "Global.arch").name for name in ("YOLOv5", "YOLOv6", "YOLOv7", "PPYOLOE")] == [
        "yolo", "yolo", "yolo", "ppyoloe",
    ]  # fmt: skip
    with pytest.raises(UserError, match="Global.arch is 'yolox', expected one of rtdetr"):
        family_named("yolox", "Global.arch")


def test_every_family_has_its_own_name() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


def random_boxes(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 80, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (count, 2))], axis=1).astype(np.float32)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("seed, top, keep, threshold", [(0, 1000, 300, 0.7), (1, 20, 10, 0.5), (2, -1, -1, 0.3)])
def test_nms_is_paddles_multiclass_nms3(seed: int, top: int, keep: int, threshold: float, normalized: bool) -> None:
    import paddle

    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(200, seed), rng.random((200, 3)).astype(np.float32)
    post = PostProcess(0.2, threshold, nms_top_k=top, keep_top_k=keep, normalized=normalized)
    ours = multiclass_nms(boxes, scores, post)
    paddle.disable_static()
    theirs, _, count = paddle._C_ops.multiclass_nms3(
        paddle.to_tensor(boxes[None]), paddle.to_tensor(scores.T[None].copy()), None,
        0.2, top, keep, threshold, normalized, 1.0, -1,
    )  # fmt: skip
    theirs = theirs.numpy()
    assert len(ours) == int(count) > 5
    # The operator orders by class; the detections are the same.
    order = np.lexsort((ours[:, 2], -ours[:, 1], ours[:, 0]))
    np.testing.assert_allclose(ours[order], theirs[np.lexsort((theirs[:, 2], -theirs[:, 1], theirs[:, 0]))], rtol=1e-6)


def test_nms_of_nothing() -> None:
    assert multiclass_nms(np.zeros((0, 4)), np.zeros((0, 2)), PostProcess()).shape == (0, 6)
    assert multiclass_nms(random_boxes(5, 0), np.zeros((5, 2)), PostProcess()).shape == (0, 6)
    # Boxes without an area overlap nothing and are kept.
    assert len(multiclass_nms(np.zeros((3, 4), np.float32), np.ones((3, 1), np.float32), PostProcess())) == 3


def test_nms_of_hundreds_of_classes_ends_with_the_rows_that_are_kept() -> None:
    """LVIS has 1,203 classes; nearly all scores of a model that is not trained are above 0.001."""
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(400, 0), rng.random((400, 1203)).astype(np.float32)
    start = time.process_time()
    found = multiclass_nms(boxes, scores, PostProcess(0.001))
    assert time.process_time() - start < 3
    every = multiclass_nms(boxes, scores[:, :40], PostProcess(0.001, keep_top_k=-1))
    assert found.shape == (300, 6) and len(every) > 1000 and (np.diff(every[:, 1]) <= 0).all()
    np.testing.assert_array_equal(multiclass_nms(boxes, scores[:, :40], PostProcess(0.001)), every[:300])


def test_best_pairs_are_the_highest_scores_of_all_classes() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    rows = best_pairs(scores, boxes, PostProcess(score_threshold=0.15, keep_top_k=3))
    assert rows[:, :2].tolist() == [[0, np.float32(0.9)], [1, np.float32(0.8)], [0, np.float32(0.2)]]
    assert rows[:, 2:].tolist() == [boxes[0].tolist(), boxes[1].tolist(), boxes[1].tolist()]


def batch(pad: tuple[float, float] = (0, 0)) -> dict[str, np.ndarray]:
    """A picture of 240 x 320 enlarged twice onto an input of 640 x 640, with ``pad`` rows and columns before it."""
    return {
        "image": np.zeros((1, 3, 640, 640), np.float32),
        "im_shape": np.array([[480, 640]], np.float32),
        "scale_factor": np.array([[2, 2]], np.float32),
        "pad_offset": np.array([pad], np.float32),
    }


def decoded(name: str, inputs: dict[str, np.ndarray], *outputs: np.ndarray, **post: object) -> np.ndarray:
    arrays = {f"output{index}": array for index, array in enumerate(outputs)}
    found = Decoder(family_named(name, ""), PostProcess(**post), WHERE)(arrays, inputs)  # type: ignore[arg-type]
    assert found["bbox_num"].tolist() == [len(found["bbox"])]
    return found["bbox"]


def test_yolov8_on_a_centred_letterbox() -> None:
    output = np.zeros((1, 4 + 2, 100), np.float32)
    # 100 x 60 pixels around (320, 320): the centre of the input, and so of the picture.
    output[0, :, 7] = [320, 320, 100, 60, 0.1, 0.9]
    rows = decoded("yolo", batch(pad=(80, 0)), output, score_threshold=0.5)
    np.testing.assert_allclose(rows, [[1, 0.9, 135, 105, 185, 135]])


def test_yolov5_multiplies_scores_by_the_objectness() -> None:
    output = np.zeros((1, 100, 5 + 2), np.float32)
    output[0, 3] = [320, 240, 100, 60, 0.5, 0.9, 0.2]
    rows = decoded("yolo", batch(), output, score_threshold=0.01)
    np.testing.assert_allclose(rows, [[0, 0.45, 135, 105, 185, 135], [1, 0.1, 135, 105, 185, 135]], rtol=1e-6)


def test_boxes_are_clipped_to_the_picture_unless_told_otherwise() -> None:
    output = np.zeros((1, 5, 100), np.float32)
    output[0, :, 0] = [0, 80, 40, 40, 0.9]  # half of it left of the picture, half above it
    clipped = decoded("yolo", batch(pad=(80, 0)), output)
    np.testing.assert_allclose(clipped[0, 2:], [0, 0, 10, 10])
    np.testing.assert_allclose(decoded("yolo", batch(pad=(80, 0)), output, clip=False)[0, 2:], [-10, -10, 10, 10])


def test_as_many_rows_as_channels_are_read_by_the_number_of_classes() -> None:
    output = np.zeros((1, 84, 84), np.float32)  # an input of 64 x 64 has 84 boxes; 80 classes make 84 channels
    output[0, :, 5] = 0
    output[0, :4, 5], output[0, 4 + 17, 5] = [32, 32, 8, 8], 0.9
    inputs = {**batch(), "image": np.zeros((1, 3, 64, 64), np.float32)}
    rows = decoded("yolo", inputs, output, score_threshold=0.5, num_classes=80)
    assert rows[:, 0].tolist() == [17]


def test_raw_detr_is_scaled_to_the_original_picture() -> None:
    logits = np.full((1, 2, 3), -np.inf, np.float32)
    logits[0, 1, 2] = 2
    boxes = np.array([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.375, 0.25, 0.25]]], np.float32)
    rows = decoded("detr_raw", batch(), logits, boxes, score_threshold=0.5)
    np.testing.assert_allclose(rows, [[2, 1 / (1 + np.exp(-2)), 120, 80, 200, 160]], rtol=1e-6)


def test_ppyoloe_without_nms_is_in_pixels_of_the_picture_already() -> None:
    boxes = np.array([[[10, 20, 30, 40], [11, 20, 30, 40], [300, 200, 400, 300]]], np.float32)
    scores = np.array([[[0.9, 0.8, 0.0], [0.0, 0.0, 0.7]]], np.float32)
    boxes, scores = np.tile(boxes, (1, 2, 1))[:, :5], np.pad(scores, ((0, 0), (0, 0), (0, 2)))
    rows = decoded("ppyoloe", batch(), boxes, scores)
    np.testing.assert_allclose(rows, [[0, 0.9, 10, 20, 30, 40], [1, 0.7, 300, 200, 320, 240]])


def test_end_to_end_rows_are_sorted_and_below_the_threshold_dropped() -> None:
    output = np.zeros((1, 300, 6), np.float32)
    output[0, :3] = [[20, 20, 40, 40, 0.5, 1], [0, 0, 10, 10, 0.9, 0], [0, 0, 9, 9, 1e-4, 0]]
    rows = decoded("end2end", batch(), output)
    np.testing.assert_allclose(rows, [[0, 0.9, 0, 0, 5, 5], [1, 0.5, 10, 10, 20, 20]])


def test_without_geometry_boxes_stay_in_pixels_of_the_input() -> None:
    output = np.zeros((2, 5, 100), np.float32)
    output[:, :, 0] = [32, 32, 8, 8, 0.9]
    inputs = {"image": np.zeros((2, 3, 64, 64), np.float32)}
    found = Decoder(family_named("yolo", ""), PostProcess(), WHERE)({"output": output}, inputs)
    assert found["bbox_num"].tolist() == [1, 1] and found["bbox"][:, 2:].tolist() == [[28, 28, 36, 36]] * 2


def test_an_array_of_another_form_is_refused() -> None:
    with pytest.raises(UserError, match="family yolo"):
        decoded("yolo", batch(), np.zeros((1, 2), np.float32))


def test_the_post_process_is_read_from_the_nms_section() -> None:
    section = {"name": "MultiClassNMS", "nms_threshold": 0.6, "nms_top_k": 1000, "score_threshold": 0, "clip": False}
    post = PostProcess.of({"NMS": section, "label_list": ["a", "b"]}, "infer_cfg.yml")
    assert post == PostProcess(0, 0.6, 1000, 300, False, 2)


@pytest.mark.parametrize(
    "section, named",
    [
        ({"nms_threshold": 1.5}, "NMS.nms_threshold is 1.5, expected a number from 0 to 1"),
        ({"keep_top_k": 0}, "NMS.keep_top_k is 0, expected a positive integer"),
        ({"keep_top_k": True}, "NMS.keep_top_k is True"),
        ({"clip": 1}, "NMS.clip is 1, expected true or false"),
        ([1], "NMS is"),
    ],
)
def test_wrong_thresholds_are_one_line(section: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        PostProcess.of({"NMS": section}, "infer_cfg.yml")


def test_the_geometry_defaults_to_an_unresized_picture() -> None:
    geometry = Geometry.of({"image": np.zeros((2, 3, 32, 64))}, 2)
    assert geometry.input_size == (32, 64) and geometry.im_shape.tolist() == [[32, 64]] * 2
    assert geometry.to_original(np.array([[-5, 0, 70, 40]], np.float32), 1, True).tolist() == [[0, 0, 64, 32]]
