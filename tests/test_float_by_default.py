"""Ops that stay float by default: found by the structure of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.float_by_default import (
    DISTRIBUTION,
    LINEAR_ATTENTION,
    NO_MATRIX,
    SIMILARITY,
    float_by_default,
)
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode


@pytest.fixture
def model(tmp_path: Path) -> InferenceModel:
    """A convolution, DFL as YOLOv8 and D-FINE have it, and products with constants of four dimensions and of one."""
    import paddle
    import paddle.nn.functional as F

    def constant(name: str, shape: list[int]) -> object:
        values = np.random.default_rng(0).random(shape, np.float32)
        start = paddle.nn.initializer.Assign(values)
        return paddle.static.create_parameter(shape, "float32", attr=paddle.ParamAttr(name=name, initializer=start))

    with static_mode(), paddle.utils.unique_name.guard():
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            image = paddle.static.data("image", [-1, 3, 8, 8], "float32")
            features = F.conv2d(image, constant("w", [64, 3, 1, 1]))
            sides = paddle.transpose(paddle.reshape(features, [-1, 4, 16, 64]), [0, 2, 1, 3])
            boxes = F.conv2d(F.softmax(sides, axis=1), constant("distances", [1, 16, 1, 1]))
            tokens = paddle.matmul(paddle.reshape(features, [-1, 4, 64, 16]), constant("text", [1, 4, 16, 5]))
            means = paddle.matmul(F.softmax(tokens), constant("row", [5]))
            sums = paddle.matmul(tokens, constant("vector", [5]))
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            paddle.static.save_inference_model(str(tmp_path / "model"), [image], [boxes, means, sums], executor)
    return InferenceModel.load(tmp_path)


def test_the_mean_of_a_distribution_and_products_with_what_is_no_matrix(model: InferenceModel) -> None:
    with static_mode():
        graph = StaticGraph.load(model)
        ops = quantizable_ops(graph, ("conv2d", "matmul_v2"))
        found = float_by_default(graph, ops)
        graph.close()
    by_weight = {op.weight: op.name for op in ops}
    expected = {"distances": DISTRIBUTION, "row": DISTRIBUTION, "text": NO_MATRIX, "vector": NO_MATRIX}
    assert len(ops) == 5 and found == {by_weight[weight]: reason for weight, reason in expected.items()}


@pytest.fixture
def attention(tmp_path: Path) -> InferenceModel:
    """A linear attention as EfficientViT has it, and one whose sums are a product of their own."""
    import paddle
    import paddle.nn.functional as F

    with static_mode(), paddle.utils.unique_name.guard():
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            queries, keys, values = (paddle.static.data(name, [-1, 2, 16, 8], "float32") for name in ("q", "k", "v"))
            start = paddle.nn.initializer.Assign(np.ones((8, 8), np.float32))
            weight = paddle.static.create_parameter([8, 8], "float32", attr=paddle.ParamAttr("w", initializer=start))
            ones = paddle.ones_like(values[:, :, :, :1])
            inner = paddle.matmul(F.relu(keys), paddle.concat([values, ones], axis=-1), transpose_x=True)
            both = paddle.matmul(F.relu(queries), inner)
            joint = both[:, :, :, :-1] / (both[:, :, :, -1:] + 1e-6)
            scores = paddle.matmul(F.relu(queries), F.relu(keys), transpose_y=True)
            apart = paddle.matmul(scores, paddle.matmul(values, weight)) / paddle.sum(scores, axis=-1, keepdim=True)
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            inputs, outputs = [queries, keys, values], [paddle.matmul(found, weight) for found in (joint, apart)]
            paddle.static.save_inference_model(str(tmp_path / "model"), inputs, outputs, executor)
    return InferenceModel.load(tmp_path)


def test_the_products_of_a_linear_attention_that_hold_their_sums(attention: InferenceModel) -> None:
    with static_mode():
        graph = StaticGraph.load(attention)
        ops = quantizable_ops(graph, ("matmul_v2",))
        found = float_by_default(graph, ops)
        graph.close()
    assert len(ops) == 7
    assert found == {op.name: LINEAR_ATTENTION for op in ops[:2]}


@pytest.fixture
def similarities(tmp_path: Path) -> InferenceModel:
    """Queries chosen by their similarity to tokens, then attention to these, then scores as an open vocabulary's are."""
    import paddle
    import paddle.nn.functional as F

    with static_mode(), paddle.utils.unique_name.guard():
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            features = paddle.static.data("features", [1, 32, 8], "float32")
            tokens = paddle.static.data("tokens", [1, 4, 8], "float32")
            start = paddle.nn.initializer.Assign(np.ones((8, 8), np.float32))
            weight = paddle.static.create_parameter([8, 8], "float32", attr=paddle.ParamAttr("w", initializer=start))
            ranks = paddle.max(F.pad(paddle.matmul(features, tokens, transpose_y=True), [0, 0, 0, 0, 0, 4]), axis=-1)
            _, rows = paddle.topk(ranks, 6, axis=1)
            queries = paddle.take_along_axis(features, paddle.expand(rows.unsqueeze(-1), [1, 6, 8]), 1)
            attention = F.softmax(paddle.matmul(queries, tokens, transpose_y=True))
            queries = queries + paddle.matmul(paddle.matmul(attention, tokens), weight)
            logits = paddle.matmul(queries, tokens, transpose_y=True)
            scores = F.sigmoid(paddle.concat([logits, paddle.full([1, 6, 4], -100.0)], axis=-1))
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            paddle.static.save_inference_model(str(tmp_path / "model"), [features, tokens], [scores], executor)
    return InferenceModel.load(tmp_path)


def test_similarities_that_are_scores_and_no_others(similarities: InferenceModel) -> None:
    with static_mode():
        graph = StaticGraph.load(similarities)
        ops = quantizable_ops(graph, ("matmul_v2",))
        found = float_by_default(graph, ops)
        graph.close()
    # Of the ranks, the attention (two products and a linear layer) and the scores.
    assert len(ops) == 5
    assert found == {ops[0].name: SIMILARITY, ops[4].name: SIMILARITY}
