"""The distillation loss on detections: found by graph structure, on the teacher's queries, and equal to its formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import paddle
import pytest

from act_pipeline.compress.qat import detection_loss
from act_pipeline.compress.qat.detection_loss import (
    DetectionDistillation,
    DetectionTensors,
    align,
)
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.demo import COMPRESS_CONFIG
from act_pipeline.graph.detection_tensors import find_detection_tensors
from act_pipeline.graph.static_graph import StaticGraph, static_mode

N, Q, C, PLACES = 2, 5, 3, 20


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.astype(np.float64)))


def divergence(student: np.ndarray, teacher: np.ndarray) -> float:
    t, s = sigmoid(teacher), sigmoid(student)
    each = (t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))).sum(-1)
    weights = np.maximum(t, s).max(-1) + 0.02
    return float((weights * each).sum() / weights.sum())


def giou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    a, b = (
        (np.concatenate([box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2], -1))
        for box in (first, second)
    )
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    around = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    return shared / union - (around - union) / around


def computed(student: dict[str, np.ndarray], teacher: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss and its gradients with respect to the student's tensors."""
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
            sides = []
            for prefix, side in (("s", student), ("t", teacher)):
                found = {name: paddle.static.data(f"{prefix}_{name}", value.shape) for name, value in side.items()}
                for variable in found.values():
                    variable.stop_gradient = False
                sides.append(found)
            loss = detection_loss.detection_loss(*sides)
            gradients = paddle.static.gradients([loss], list(sides[0].values()))
        feed = {f"s_{name}": value for name, value in student.items()}
        feed.update({f"t_{name}": value for name, value in teacher.items()})
        assert all(var.name.startswith((*feed, detection_loss.LOSS_PREFIX)) for var in program.list_vars())
        executor = paddle.static.Executor(paddle.CPUPlace())
        value, *found = executor.run(program, feed=feed, fetch_list=[loss, *gradients])
        return float(value), dict(zip(student, found))


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (N, Q, 2)), rng.uniform(0.05, 0.6, (N, Q, 2))], -1)
    shapes = {"logits": (N, Q, C), "encoder_logits": (N, PLACES, C)}
    return {
        "boxes": boxes.astype(np.float32),
        **{k: rng.normal(-2, 2, v).astype(np.float32) for k, v in shapes.items()},
    }


def test_the_loss_is_its_formula() -> None:
    student, teacher = tensors(0), tensors(1)
    value = sigmoid(teacher["logits"]).max(-1)

    def mean(values: np.ndarray) -> float:
        return float((value * values).sum() / value.sum())

    expected = divergence(student["logits"], teacher["logits"])
    expected += divergence(student["encoder_logits"], teacher["encoder_logits"])
    expected += 5 * mean(np.abs(student["boxes"] - teacher["boxes"]).sum(-1))
    expected += 2 * mean(1 - giou(student["boxes"].astype(np.float64), teacher["boxes"].astype(np.float64)))
    found, gradients = computed(student, teacher)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() > 0 for gradient in gradients.values())


def test_a_student_that_is_its_teacher_has_no_loss_and_boxes_of_no_size_no_nan() -> None:
    teacher = tensors(1)
    found, gradients = computed(teacher, teacher)
    assert found == pytest.approx(0, abs=1e-5)
    assert np.abs(gradients["logits"]).max() < 1e-6
    none = {**teacher, "boxes": np.zeros_like(teacher["boxes"]), "logits": np.full_like(teacher["logits"], -90)}
    found, gradients = computed(none, none)
    assert np.isfinite(found) and all(np.isfinite(gradient).all() for gradient in gradients.values())


def sizes_of(model: InferenceModel, found: DetectionTensors) -> dict[str, tuple[int, ...]]:
    with static_mode():
        block = StaticGraph.load(model).program.global_block()
        return {
            name: tuple(block.var(getattr(found, name)).shape[1:])
            for name in ("queries", "logits", "boxes", "encoder_logits")
        }


def test_an_rtdetrs_tensors_are_found_with_and_without_its_post_process(demo, tmp_path: Path) -> None:
    found = find_detection_tensors(demo.fp32)
    assert found is not None
    queries, classes, places = found.sizes
    assert sizes_of(demo.fp32, found) == {
        "queries": (queries,),
        "logits": (queries, classes),
        "boxes": (queries, 4),
        "encoder_logits": (places, classes),
    }
    with static_mode():
        graph = StaticGraph.load(demo.fp32)
        graph.unwrap_outputs()
        graph.fetch_targets = [graph.program.global_block().var(name) for name in (found.boxes, found.logits)]
        bare = graph.save(tmp_path)
    assert find_detection_tensors(bare) == found


def test_a_teacher_of_other_sizes_is_refused(demo) -> None:
    found = find_detection_tensors(demo.fp32)
    assert found is not None
    other = dataclasses.replace(found, sizes=(100, *found.sizes[1:]))
    with pytest.raises(UserError, match=r"has 100 queries, 10 classes and -?\d+ places, expected"):
        DetectionDistillation(found, other, "teacher_")


def test_the_student_decodes_the_teachers_queries() -> None:
    """Rows are gathered by the teacher's indices; otherwise teacher and student would order queries differently."""
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program), paddle.utils.unique_name.guard():
            scores = {name: paddle.static.data(name, [1, 6]) for name in ("student", "teacher")}
            _, indices = paddle.topk(scores["student"], 3)
            _, other = paddle.topk(scores["teacher"], 3)
            rows = paddle.take_along_axis(scores["student"], indices, 1)
            block = program.global_block()
            block._rename_var(other.name, f"teacher_{indices.name}")
            found = DetectionTensors(indices.name, "", "", "", (3, 1, 6))
            assert align(block, found, found, "teacher_") == 1
        feed = {"student": np.float32([[6, 5, 4, 3, 2, 1]]), "teacher": np.float32([[1, 2, 3, 4, 5, 6]])}
        (given,) = paddle.static.Executor(paddle.CPUPlace()).run(program, feed=feed, fetch_list=[rows.name])
    assert given.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("override", ["Distillation.node=[a, b]", "Distillation.node=[[a], [b]]"])
def test_nodes_beside_it_are_refused(override: str) -> None:
    with pytest.raises(UserError, match="Distillation.loss is detection, which selects its tensors itself"):
        load_config(COMPRESS_CONFIG, ["Distillation.loss=detection", override])
