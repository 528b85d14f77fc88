"""Quantization-aware training of detectors other than RT-DETR: scores and boxes before NMS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import tiny_training

from act_pipeline.compress.qat.detection_loss import detection_loss, require_tensors
from act_pipeline.compress.qat.raw_outputs import compared, find_raw_tensors
from act_pipeline.compress.qat.trainable_weights import trainable_weights
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.families.interface import Part, RawOutputs
from act_pipeline.graph.static_graph import static_mode

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
YOLO = SHARED / "models/bccd_yolov8n/yolov8n_bccd.onnx"
SIZE, CLASSES, BINS = 64, 3, 4


class SameBatch(tiny_training.Numbers):
    """Two images, the same in each step."""

    def __call__(self):
        for _ in range(7):
            yield {"image": np.random.default_rng(1).random((2, 3, SIZE, SIZE), dtype=np.float32)}


def conv(x: Any, channels: int, size: int = 1, stride: int = 1) -> Any:
    return paddle.static.nn.conv2d(x, channels, size, stride=stride, padding=size // 2)


def yolo_outputs(image: Any) -> tuple[Any, Any]:
    """Return boxes [N, 4, 64] (centre, size in pixels; the mean of a distribution, as in YOLOv8) and logits."""
    features = paddle.nn.functional.relu(conv(paddle.nn.functional.relu(conv(image, 8, 3, 4)), 16, 3, 2))
    sides = paddle.nn.functional.softmax(conv(features, 4 * BINS).reshape([0, 4, BINS, 64]).transpose([0, 2, 1, 3]), 1)
    mean = paddle.static.nn.conv2d(
        sides, 1, 1, bias_attr=False, param_attr=paddle.ParamAttr("bins", paddle.nn.initializer.Uniform(0, 3))
    )
    return mean.reshape([0, 4, 64]) * 16.0, conv(features, CLASSES).reshape([0, CLASSES, 64])


def yolo(image: Any) -> list[Any]:
    boxes, logits = yolo_outputs(image)
    return [paddle.concat([boxes, paddle.nn.functional.sigmoid(logits)], 1)]


def ppyoloe(image: Any) -> list[Any]:
    boxes, logits = yolo_outputs(image)
    boxes = boxes.transpose([0, 2, 1])
    corners = paddle.concat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
    return [corners, paddle.nn.functional.sigmoid(logits)]


def detr(image: Any) -> list[Any]:
    boxes, logits = yolo_outputs(image)
    return [logits.transpose([0, 2, 1]), paddle.nn.functional.sigmoid(boxes.transpose([0, 2, 1]) / 64 - 1)]


def masked_detr(image: Any) -> list[Any]:
    """A DETR that two readers of one mask follow, as GroundingDINO's text has it."""
    logits, boxes = detr(image)
    inside = paddle.unsqueeze(boxes.sum(-1) > -1, -1)
    return [logits * inside.astype("float32"), boxes * inside.astype("float32")]


def with_nms(image: Any) -> list[Any]:
    boxes, scores = ppyoloe(image)
    block = paddle.static.default_main_program().global_block()
    bbox = block.create_var(name="bbox", shape=[-1, 6], dtype="float32")
    index, count = (block.create_var(name=name, shape=[-1], dtype="int32") for name in ("index", "bbox_num"))
    block.append_op(
        type="multiclass_nms3",
        inputs={"BBoxes": boxes, "Scores": scores},
        outputs={"Out": bbox, "Index": index, "NmsRoisNum": count},
        attrs={"background_label": -1, "score_threshold": 0.01, "nms_top_k": 64, "nms_threshold": 0.6,
               "keep_top_k": 20, "nms_eta": 1.0, "normalized": True},
    )  # fmt: skip
    return [bbox, count]


def export(
    directory: Path, network: Callable[[Any], list[Any]], seed: int = 0, prefix: str = "", arch: str = ""
) -> InferenceModel:
    """Write a float model with weights by ``seed`` and generated names that begin with ``prefix``."""
    directory.mkdir(parents=True)
    with static_mode():
        main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        main.random_seed = startup.random_seed = seed + 1
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard(prefix):
                image = paddle.static.data("image", [-1, 3, SIZE, SIZE], "float32")
                outputs = network(image)
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                paddle.static.save_inference_model(str(directory / "model"), [image], outputs, executor, program=main)
    labels = f"label_list: [{', '.join('abc'[:CLASSES])}]\n"
    (directory / "infer_cfg.yml").write_text(labels + (f"arch: {arch}\n" if arch else ""))
    return InferenceModel.load(directory)


def losses(directory: Path, loss: str, iterations: int = 3, rate: float = 0.02) -> list[float]:
    """Train ``directory/float``, taught by ``directory/teacher``, and return the losses."""
    teacher = [
        f"Distillation.teacher_model_dir={directory / 'teacher'}",
        "Distillation.teacher_model_filename=model.pdmodel",
        "Distillation.teacher_params_filename=model.pdiparams",
        f"TrainConfig.learning_rate={rate}",
    ]
    training = tiny_training.run(
        directory, iterations, "SGD", loss=loss, evaluate=False, overrides=tuple(teacher), batches=SameBatch()
    )
    return [value for _, value in training.losses]


@pytest.mark.parametrize("network", [yolo, ppyoloe, detr, masked_detr, with_nms])
def test_a_detector_learns_its_teachers_scores_and_boxes(tmp_path: Path, network: Callable[[Any], list[Any]]) -> None:
    export(tmp_path / "float", network, seed=0)
    export(tmp_path / "teacher", network, seed=1)
    found = losses(tmp_path, "detection")
    assert np.isfinite(found).all()
    assert found[0] > found[1] > found[2] > 0


@pytest.mark.parametrize(("network", "weight"), [(yolo, 10), (ppyoloe, 10), (with_nms, 10), (detr, 1)])
def test_the_loss_of_a_grids_places_has_a_weight(
    tmp_path: Path, network: Callable[[Any], list[Any]], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "float", network, seed=0)
    export(tmp_path / "teacher", network, seed=1)
    found = losses(tmp_path, "detection", iterations=1)
    monkeypatch.setattr("act_pipeline.compress.qat.detection_loss._PLACES_WEIGHT", 1.0)
    assert found[0] == pytest.approx(weight * losses(tmp_path, "detection", iterations=1)[0], rel=1e-3)


def test_distances_of_a_distribution_are_no_weights(tmp_path: Path) -> None:
    model = export(tmp_path / "float", yolo)
    with static_mode():
        program = paddle.static.Program.parse_from_string(model.model_path.read_bytes())
        weights = trainable_weights(program)
    assert "bins" not in weights
    assert sum(name.endswith(".w_0") for name in weights) == 4


def test_an_array_with_objectness_is_read_by_columns(tmp_path: Path) -> None:
    def anchors(image: Any) -> list[Any]:
        boxes, logits = yolo_outputs(image)
        rows = paddle.concat([boxes, paddle.nn.functional.sigmoid(paddle.concat([logits[:, :1], logits], 1))], 1)
        return [rows.transpose([0, 2, 1])]

    model = export(tmp_path / "float", anchors)
    config = tiny_training.make_config(tmp_path / "config.yml", 1, loss="detection")
    found = find_raw_tensors(config, model)
    assert found is not None and found.sizes == (64, CLASSES)
    parts = (found.parts.scores, found.parts.boxes, found.parts.objectness)
    assert [(part.axis, part.start, part.end) for part in parts if part] == [(2, 5, None), (2, 0, 4), (2, 4, 5)]


def test_the_loss_of_scores_is_that_of_their_logits_and_of_boxes_relative_to_the_input() -> None:
    """A certain score (1.0 in float32) has a finite gradient; equal models have no loss."""
    rng = np.random.default_rng(0)
    logits = {side: rng.normal(-1, 2, (1, 5, 3)).astype(np.float32) for side in "st"}
    boxes = {side: rng.uniform(0.1, 0.5, (1, 5, 4)).astype(np.float32) for side in "st"}
    scores = {side: 1 / (1 + np.exp(-values)) for side, values in logits.items()}
    certain = np.concatenate([boxes["s"] * SIZE, np.round(scores["s"])], -1).transpose(0, 2, 1)
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program), paddle.utils.unique_name.guard():
            image = paddle.static.data("image", [1, 3, SIZE, SIZE])
            raw = {side: paddle.static.data(side, [1, 7, 5]) for side in "st"}
            raw["s"].stop_gradient = False
            parts = RawOutputs(Part("x", 1, 4), Part("x", 1, 0, 4))
            sides = [compared({"x": raw[side]}, parts, image, name) for side, name in (("s", "student"), ("t", "t"))]
            loss = detection_loss(*sides)
            (gradient,) = paddle.static.gradients([loss], [raw["s"]])
        executor = paddle.static.Executor(paddle.CPUPlace())

        def run(student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
            feed = {"image": np.zeros((1, 3, SIZE, SIZE), np.float32), "s": student, "t": teacher}
            value, slope = executor.run(program, feed=feed, fetch_list=[loss, gradient])
            return float(value), slope

        arrays = {
            side: np.concatenate([boxes[side] * SIZE, scores[side]], -1).transpose(0, 2, 1).copy() for side in "st"
        }
        same, _ = run(arrays["t"], arrays["t"])
        other, slope = run(arrays["s"], arrays["t"])
        _, edge = run(certain.astype(np.float32).copy(), arrays["t"])
    assert same == pytest.approx(0, abs=1e-5)
    assert np.isfinite(slope).all() and np.isfinite(edge).all() and np.abs(edge[:, 4:]).min() > 0
    t, s = scores["t"].astype(np.float64), scores["s"].astype(np.float64)
    divergence = (t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))).sum(-1)
    weights, value = np.maximum(t, s).max(-1) + 0.02, t.max(-1)
    distance = np.abs(boxes["s"] - boxes["t"]).sum(-1)
    least = (weights * divergence).sum() / weights.sum() + 5 * (value * distance).sum() / value.sum()
    assert least < other < least + 4 + 1e-3  # 2 (1 - GIoU) is in [0, 4]


def test_classes_that_are_masked_out_neither_add_to_the_loss_nor_end_it() -> None:
    """The logits of GroundingDINO are -inf beyond its prompt, those of the model and those of its teacher."""
    rng = np.random.default_rng(0)
    feed = {side: rng.normal(-1, 2, (1, 5, 3)).astype(np.float32) for side in "st"}
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program), paddle.utils.unique_name.guard():
            boxes = paddle.full([1, 5, 4], 0.25)
            logits = {side: paddle.static.data(side, [1, 5, -1]) for side in "st"}
            logits["s"].stop_gradient = False
            loss = detection_loss(*({"logits": logits[side], "boxes": boxes} for side in "st"))
            (gradient,) = paddle.static.gradients([loss], [logits["s"]])
        executor = paddle.static.Executor(paddle.CPUPlace())
        expected, slope = executor.run(program, feed=feed, fetch_list=[loss, gradient])
        outside = np.full((1, 5, 2), -np.inf, np.float32)
        masked = {side: np.concatenate([values, outside], -1) for side, values in feed.items()}
        found, masked_slope = executor.run(program, feed=masked, fetch_list=[loss, gradient])
    assert float(found) == pytest.approx(float(expected), rel=1e-6) and float(found) > 0.1
    np.testing.assert_allclose(masked_slope, np.concatenate([slope, np.zeros_like(outside)], -1), rtol=1e-5, atol=1e-7)


def test_a_graph_without_scores_before_nms_is_refused_in_one_line(tmp_path: Path) -> None:
    def pairs(image: Any) -> list[Any]:
        row = paddle.mean(conv(image, 6), [2, 3])
        return [row, paddle.sum(row, 1)]

    model = export(tmp_path / "float", pairs)
    config = tiny_training.make_config(tmp_path / "config.yml", 1, loss="detection")
    with pytest.raises(UserError, match="Distillation.loss is detection, which needs .* before NMS .*; set it to l2$"):
        require_tensors(config, model)


READER = f"""
metric: COCO
num_classes: 3
TrainDataset:
  !COCODataSet {{image_dir: images, anno_path: annotations/instances_train.json, dataset_dir: {SHARED}/data/bccd}}
EvalDataset:
  !COCODataSet {{image_dir: images, anno_path: annotations/instances_test.json, dataset_dir: {SHARED}/data/bccd}}
worker_num: 1
EvalReader:
  sample_transforms:
    - Decode: {{}}
    - Resize: {{target_size: [640, 640], keep_ratio: True, interp: 1}}
    - Pad: {{size: [640, 640], pad_mode: 1, fill_value: [114., 114., 114.]}}
    - NormalizeImage: {{mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}}
    - Permute: {{}}
  batch_size: 1
"""


@pytest.mark.slow
@pytest.mark.skipif(not YOLO.exists(), reason="needs ../shared/models/bccd_yolov8n beside the repository")
def test_a_real_yolov8n_trains_from_onnx(tmp_path: Path) -> None:
    (tmp_path / "reader.yml").write_text(READER)
    (tmp_path / "config.yml").write_text(
        tiny_training.CONFIG.replace("unused.yml", str(tmp_path / "reader.yml"))
        .replace("model_dir: unused", f"model_dir: {tmp_path / 'float'}, Evaluation: false")
        .replace("loss: l2", "loss: detection")
        + "Strategy: {name: qat_dis}\n"
    )
    commands = [
        ["import_model.py", "--onnx", str(YOLO), "--output", str(tmp_path / "float")],
        ["compress.py", "-c", str(tmp_path / "config.yml"), "--save_dir", str(tmp_path / "int8"), "--lang", "none",
         "-o", "TrainConfig.train_iter=3", "TrainConfig.learning_rate=0.0001",
         "TrainConfig.optimizer_builder={optimizer: {type: SGD}}"],
    ]  # fmt: skip
    for name, *arguments in commands:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "int8/act.json").read_text())
    found = record["training"]["loss"]
    assert len(found) == 3 and max(found) < 5, found
