"""1 x 1 convolutions of a neck, split between the maps that they read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from two_level_models import Build, conv, projected, relu, run, saved

from act_pipeline.graph.folding import fold_batch_norm
from act_pipeline.graph.name_scopes import module_of
from act_pipeline.graph.neck_convolutions import split_neck_convolutions
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def raised(x: Any, mode: str = "nearest") -> Any:
    return paddle.nn.functional.interpolate(x, scale_factor=2, mode=mode)


def activated(x: Any, channels: int, **options: Any) -> Any:
    with paddle.static.name_scope("neck.fuse"):
        x = conv(x, channels, 1, bias_attr=False, **options)
    return relu(paddle.static.nn.batch_norm(x, is_test=True))


def neck(fine: Any, coarse: Any) -> Any:
    """RT-DETR's: two convolutions read an upsampled map and a projection of the backbone's."""
    both = paddle.concat([raised(coarse), projected(fine, 12)], axis=1)
    return activated(both, 8) + activated(both, 8)


def plain(fine: Any, coarse: Any) -> Any:
    """YOLO's: the other map is the backbone's own, and another layer reads that too."""
    return activated(paddle.concat([raised(coarse), fine], axis=1), 8) + fine[:, :1]


def three(fine: Any, coarse: Any) -> Any:
    """Two maps are upsampled."""
    return activated(paddle.concat([raised(coarse), fine, raised(relu(coarse))], axis=1), 8)


def narrow(fine: Any, coarse: Any) -> Any:
    """One product of the projection and the convolution would have more multiplications than the two."""
    return activated(paddle.concat([raised(coarse), projected(fine, 1)], axis=1), 8)


def smooth(fine: Any, coarse: Any) -> Any:
    return activated(paddle.concat([raised(coarse, "bilinear"), fine], axis=1), 8)


def wide(fine: Any, coarse: Any) -> Any:
    return activated(paddle.concat([raised(coarse), fine], axis=1), 8, padding=1)


def read_twice(fine: Any, coarse: Any) -> Any:
    both = paddle.concat([raised(coarse), fine], axis=1)
    return activated(both, 8) + both.mean([1], keepdim=True)


def all_raised(fine: Any, coarse: Any) -> Any:
    return activated(paddle.concat([raised(coarse), raised(relu(coarse))], axis=1), 8) + fine[:, :1]


def rows(fine: Any, coarse: Any) -> Any:
    """The maps lie below one another."""
    return activated(paddle.concat([raised(conv(coarse, 6, 1)), fine], axis=2), 8)


def lowered(fine: Any, coarse: Any) -> Any:
    """A map of fewer pixels is made: before that the product would have more."""
    small = paddle.nn.functional.interpolate(fine, scale_factor=0.5, mode="nearest")
    return activated(paddle.concat([small, coarse], axis=1), 8)


def by_column(fine: Any, coarse: Any) -> Any:
    """As many columns of pixels as channels, and a vector that is added to the columns."""
    both = paddle.concat([raised(coarse), fine], axis=1)
    vector = paddle.static.create_parameter([16], "float32")
    return relu(conv(both, 16, 1, bias_attr=False) + vector)


def shapes(graph: StaticGraph) -> list[tuple[tuple[int, ...], int]]:
    """Return the weight's shape and the height of the output of each 1 x 1 convolution."""
    block = graph.program.global_block()
    found = [(block.var(op.input("Filter")[0]).shape, block.var(op.output("Output")[0]).shape[2])
             for op in block.ops if op.type == "conv2d"]  # fmt: skip
    return [(shape[:2], height) for shape, height in found if shape[2:] == (1, 1)]


@pytest.mark.parametrize(
    ("build", "count", "expected"),
    [
        (neck, 2, [((8, 10), 8), ((8, 6), 16), ((8, 10), 8), ((8, 6), 16)]),
        (plain, 1, [((8, 10), 8), ((8, 6), 16)]),
        (three, 1, [((8, 10), 8), ((8, 10), 8), ((8, 6), 16)]),
        (narrow, 1, [((1, 6), 16), ((8, 10), 8), ((8, 1), 16)]),
    ],
)
def test_the_result_is_the_same_with_fewer_multiplications(
    build: Build, count: int, expected: list[Any], tmp_path: Path
) -> None:
    with static_mode(), contextlib.closing(StaticGraph.load(saved(build, tmp_path))) as graph:
        fold_batch_norm(graph)
        before = run(graph)
        assert split_neck_convolutions(graph) == count
        assert sorted(shapes(graph)) == sorted(expected)
        np.testing.assert_allclose(run(graph), before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
        ops = [op for op in graph.program.global_block().ops if op.type == "conv2d"]
        split = [op for op in ops if module_of(op).startswith("neck.fuse")]
        assert len(split) == len(expected) - (build is narrow) and all(op.has_attr(BATCH_NORM_FACTOR) for op in split)
        (tmp_path / "again").mkdir()
        again = graph.save(tmp_path / "again")
        with contextlib.closing(StaticGraph.load(again)) as loaded:
            np.testing.assert_array_equal(run(loaded), run(graph))


@pytest.mark.parametrize("build", [smooth, wide, read_twice, all_raised, rows, lowered, by_column])
def test_others_are_left_as_they_are(build: Build, tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(StaticGraph.load(saved(build, tmp_path))) as graph:
        fold_batch_norm(graph)
        before = graph.program.to_string(False)
        assert split_neck_convolutions(graph) == 0 and graph.program.to_string(False) == before


def test_a_concatenation_that_is_an_output_is_left_as_it_is(tmp_path: Path) -> None:
    with static_mode(), contextlib.closing(StaticGraph.load(saved(plain, tmp_path))) as graph:
        fold_batch_norm(graph)
        block = graph.program.global_block()
        graph.fetch_targets.append(block.var(next(op for op in block.ops if op.type == "concat").output("Out")[0]))
        assert split_neck_convolutions(graph) == 0
