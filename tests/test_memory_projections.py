"""Projections of the memory's levels as part of the linear layers that read it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from two_level_models import Build, conv, projected, relu, run, saved

from act_pipeline.compress.judging.float_checks import check_nodes
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import UserError
from act_pipeline.graph.folding import fold, fold_batch_norm, fold_constants
from act_pipeline.graph.memory_projections import merge_memory_projections
from act_pipeline.graph.name_scopes import module_of
from act_pipeline.graph.row_masks import multiply_by_masks
from act_pipeline.graph.static_graph import StaticGraph, static_mode

WIDTH = 12
PIXELS = 16 * 16 + 8 * 8


def rows(x: Any) -> Any:
    return x.flatten(2).transpose([0, 2, 1])


def memory_of(fine: Any, coarse: Any) -> Any:
    return paddle.concat([rows(projected(fine, WIDTH)), rows(projected(coarse, WIDTH))], axis=1)


def linear(x: Any, outputs: int, **options: Any) -> Any:
    normal = paddle.nn.initializer.Normal()
    weight, bias = (
        paddle.static.create_parameter(shape, "float32", default_initializer=normal)
        for shape in ([WIDTH, outputs], [outputs])
    )
    return paddle.matmul(x, weight, **options) + bias


def valid() -> Any:
    """A constant, True for about two thirds of the rows."""
    return constant(np.random.default_rng(2).random((1, PIXELS, 1)) < 0.7)


def constant(values: np.ndarray) -> Any:
    assign = paddle.nn.initializer.Assign(values.astype(np.float32))
    return paddle.static.create_parameter(values.shape, "float32", default_initializer=assign)


def values(fine: Any, coarse: Any) -> Any:
    """The layers of a decoder read the memory."""
    memory = memory_of(fine, coarse)
    return [relu(linear(memory, WIDTH)), relu(linear(memory, 5))]


def masked(fine: Any, coarse: Any) -> Any:
    """RT-DETR's: a linear layer of the masked memory, another one of the memory, and its size."""
    memory = memory_of(fine, coarse)
    sizes = paddle.shape(memory)[:2].astype("float32")
    return [relu(linear(memory * valid(), WIDTH)), relu(linear(memory, WIDTH)), sizes]


def masked_by_where(fine: Any, coarse: Any) -> Any:
    """As PaddleDetection exports it."""
    memory = memory_of(fine, coarse)
    chosen = paddle.where(valid().astype("bool"), memory, paddle.to_tensor(0.0))
    return [relu(linear(chosen, WIDTH)), relu(linear(memory, WIDTH))]


def masked_twice(fine: Any, coarse: Any) -> Any:
    """The second mask multiplies what the first one has left."""
    chosen = memory_of(fine, coarse)
    for mask in (valid(), constant(np.arange(PIXELS)[None, :, None] % 3)):
        chosen = paddle.where(mask.astype("bool"), chosen, paddle.to_tensor(0.0))
    return relu(chosen)


def activated(fine: Any, coarse: Any) -> Any:
    return linear(paddle.concat([rows(relu(projected(fine, WIDTH))), rows(projected(coarse, WIDTH))], axis=1), WIDTH)


def read_by_another(fine: Any, coarse: Any) -> Any:
    memory = memory_of(fine, coarse)
    return [linear(memory, WIDTH), memory.mean([2])]


def projection_read_by_another(fine: Any, coarse: Any) -> Any:
    projection = projected(fine, WIDTH)
    return [linear(paddle.concat([rows(projection), rows(projected(coarse, WIDTH))], axis=1), 5), projection.mean([1])]


def wide(fine: Any, coarse: Any) -> Any:
    """A convolution of neighbourhoods is no matrix product of its pixels."""
    wide = conv(fine, WIDTH, 3, padding=1)
    return linear(paddle.concat([rows(wide), rows(projected(coarse, WIDTH))], axis=1), 5)


def turned(fine: Any, coarse: Any) -> Any:
    return linear(memory_of(fine, coarse), WIDTH, transpose_y=True)


def shared(fine: Any, coarse: Any) -> Any:
    memory, weight = memory_of(fine, coarse), paddle.static.create_parameter([WIDTH, WIDTH], "float32")
    biases = [paddle.static.create_parameter([WIDTH], "float32") for _ in range(2)]
    return [paddle.matmul(memory, weight) + bias for bias in biases]


def sized(fine: Any, coarse: Any) -> Any:
    """The memory's width is asked for, and no result has it."""
    memory = memory_of(fine, coarse)
    return [linear(memory, 5), paddle.shape(memory).astype("float32")]


def masked_by_column(fine: Any, coarse: Any) -> Any:
    """A factor of each channel is not the same for all the channels of a row."""
    return linear(memory_of(fine, coarse) * paddle.static.create_parameter([1, 1, WIDTH], "float32"), 5)


def loaded(build: Build, folder: Path) -> StaticGraph:
    graph = StaticGraph.load(saved(build, folder))
    fold_constants(graph)
    fold_batch_norm(graph)
    return graph


def one_op_each(folder: Path, tensors: Sequence[str]) -> InferenceModel:
    """A program that computes tensors of these names."""
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc()
    block = program.blocks.add(idx=0, parent_idx=-1)
    for name in tensors:
        block.ops.add(type="relu").outputs.add(parameter="Out", arguments=[name])
    folder.mkdir()
    (folder / "model.pdmodel").write_bytes(program.SerializeToString())
    (folder / "model.pdiparams").write_bytes(b"none")
    return InferenceModel.load(folder)


def kinds(graph: StaticGraph) -> Counter[str]:
    return Counter(op.type for op in graph.program.global_block().ops)


@pytest.mark.parametrize(("build", "masks"), [(values, 0), (masked, 0), (masked_by_where, 1)])
def test_the_result_is_the_same_without_the_projections(build: Build, masks: int, tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(loaded(build, tmp_path)) as graph:
        before, convolutions = run(graph), kinds(graph)["conv2d"]
        assert multiply_by_masks(graph) == masks
        assert merge_memory_projections(graph) == 2
        # Of two levels two projections are gone, and each of two linear layers is a convolution of each level.
        assert kinds(graph)["matmul_v2"] == 0 and kinds(graph)["conv2d"] == convolutions - 2 + 4
        assert not kinds(graph)["where"] and not kinds(graph)["fill_any_like"]
        np.testing.assert_allclose(run(graph), before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
        (tmp_path / "again").mkdir()
        with contextlib.closing(StaticGraph.load(graph.save(tmp_path / "again"))) as again:
            np.testing.assert_array_equal(run(again), run(graph))


def test_one_mask_after_another(tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(loaded(masked_twice, tmp_path)) as graph:
        before = run(graph)
        assert multiply_by_masks(graph) == 2 and not kinds(graph)["where"] and not kinds(graph)["fill_any_like"]
        np.testing.assert_array_equal(run(graph), before)


@pytest.mark.parametrize(
    "build",
    [activated, read_by_another, projection_read_by_another, wide, turned, shared, sized, masked_by_column],
)
def test_others_are_left_as_they_are(build: Build, tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(loaded(build, tmp_path)) as graph:
        before = graph.program.to_string(False)
        assert merge_memory_projections(graph) == 0 and graph.program.to_string(False) == before


def test_a_memory_that_is_an_output_is_left_as_it_is(tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(loaded(values, tmp_path)) as graph:
        block = graph.program.global_block()
        graph.fetch_targets.append(block.var(next(op for op in block.ops if op.type == "concat").output("Out")[0]))
        assert merge_memory_projections(graph) == 0


def chosen_by_column(fine: Any, coarse: Any) -> Any:
    """The mask has a value for each channel."""
    mask = constant(np.eye(WIDTH)[None, :1])
    return paddle.where(mask.astype("bool"), memory_of(fine, coarse), paddle.to_tensor(0.0))


def chosen_from_ones(fine: Any, coarse: Any) -> Any:
    return paddle.where(valid().astype("bool"), memory_of(fine, coarse), paddle.to_tensor(1.0))


def chosen_by_values(fine: Any, coarse: Any) -> Any:
    memory = memory_of(fine, coarse)
    return paddle.where(memory > 0, memory, paddle.to_tensor(0.0))


@pytest.mark.parametrize("build", [chosen_by_column, chosen_from_ones, chosen_by_values])
def test_other_choices_are_left_as_they_are(build: Build, tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(loaded(build, tmp_path)) as graph:
        before = graph.program.to_string(False)
        assert multiply_by_masks(graph) == 0 and graph.program.to_string(False) == before


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("removed", "Distillation.node: 'removed' is not computed in the model as it is quantized"),
        ("kepd", "'kepd' is no tensor of .*; did you mean 'kept'"),
    ],
)
def test_a_node_that_is_not_computed_is_one_line(node: str, said: str, tmp_path: Path) -> None:
    def of(*tensors: str) -> InferenceModel:
        return one_op_each(tmp_path / "-".join(tensors), tensors)

    model, prepared = of("removed", "kept"), of("kept", "new")
    nodes = ["Distillation.loss=l2", f"Distillation.node=[kept, {node}]"]
    with pytest.raises(UserError, match=said):
        check_nodes(load_config(CONFIGS / "sample.yml", nodes), model, prepared)
    check_nodes(load_config(CONFIGS / "sample.yml", [*nodes, "Strategy.name=ptq"]), model, prepared)
    nodes[1] = "Distillation.node=[teacher_a, kept]"
    check_nodes(load_config(CONFIGS / "sample.yml", nodes), model, prepared)


def test_the_parts_of_an_rtdetr_have_the_names_of_their_layers(sample_model: InferenceModel) -> None:
    with static_mode(), contextlib.closing(fold(sample_model)) as graph:
        found = [module_of(op) for op in graph.program.global_block().ops if "level_" in module_of(op)]
    layers = ["transformer.enc_output.0"]
    layers += [f"transformer.decoder.layers.{layer}.cross_attn.value_proj" for layer in (0, 1)]
    assert found == [f"{layer}.level_{level}" for layer in layers for level in range(3)]
