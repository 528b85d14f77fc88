"""Deformable attention with gather by rows computes the same as Paddle's with ``grid_sampler``, for any points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.graph.deformable_attention import attend_by_rows, samples_by_rows
from act_pipeline.graph.onednn_broadcasts import spread_for_onednn
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.static_graph import static_mode

LEVELS = ((5, 7), (2, 3))
QUERIES, HEADS, POINTS, CHANNELS = 6, 2, 3, 4


def attention(mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = False) -> Any:
    """Return a program as traced from `act_pipeline.rtdetr.decoder`, as a ``ProgramDesc`` with the output `output`."""
    import paddle

    program = paddle.static.Program()
    pixels = sum(height * width for height, width in LEVELS)
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    with static_mode(), paddle.static.program_guard(program):
        values = paddle.static.data("values", [-1, pixels, HEADS, CHANNELS], "float32")
        grids = paddle.static.data("grids", [-1, QUERIES, HEADS, len(LEVELS), POINTS, 2], "float32")
        weights = paddle.static.data("weights", [-1, QUERIES, HEADS, len(LEVELS) * POINTS], "float32")
        sampled = []
        for level, values_there in enumerate(values.split([height * width for height, width in LEVELS], axis=1)):
            feature = values_there.transpose([0, 2, 3, 1]).reshape([-1, CHANNELS, *LEVELS[level]])
            points = grids[:, :, :, level].transpose([0, 2, 1, 3, 4]).reshape([-1, QUERIES, POINTS, 2])
            sampled.append(paddle.nn.functional.grid_sample(feature, points, **options))
        by_head = weights.transpose([0, 2, 1, 3]).reshape([-1, 1, QUERIES, len(LEVELS) * POINTS])
        output = (paddle.concat(sampled, axis=-1) * by_head).sum(-1)
        output = output.reshape([-1, HEADS * CHANNELS, QUERIES]).transpose([0, 2, 1])
        output.block._rename_var(output.name, "output")
    return parsed(program.desc.serialize_to_string())


def computed(desc: Any, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    import paddle

    with static_mode():
        program = paddle.static.Program.parse_from_string(desc.SerializeToString())
        return paddle.static.Executor(paddle.CPUPlace()).run(program, feed=dict(feed), fetch_list=["output"])[0]


def feed(images: int, reach: float = 1.3) -> dict[str, np.ndarray]:
    """Return random inputs, with some sampling points outside the feature map."""
    rng = np.random.default_rng(images)
    sizes = (images, QUERIES, HEADS, len(LEVELS), POINTS)
    pixels = sum(height * width for height, width in LEVELS)
    return {
        "values": rng.normal(size=(images, pixels, HEADS, CHANNELS)).astype(np.float32),
        "grids": rng.uniform(-reach, reach, (*sizes, 2)).astype(np.float32),
        "weights": rng.uniform(size=(*sizes[:3], len(LEVELS) * POINTS)).astype(np.float32),
    }


def by_rows() -> Any:
    desc = attention()
    assert attend_by_rows(desc) == 1
    assert not {"grid_sampler", "split"} & {op.type for op in desc.blocks[0].ops}
    return desc


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("reach", [0.9, 1.3, 5.0])
def test_rows_add_up_to_what_grid_sampler_gives(images: int, reach: float) -> None:
    inputs = feed(images, reach)
    expected = computed(attention(), inputs)
    assert expected.shape == (images, QUERIES, HEADS * CHANNELS) and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(computed(by_rows(), inputs), expected, rtol=1e-5, atol=1e-5)


def test_points_on_edges_and_in_the_middle_of_pixels() -> None:
    """Outer edges of the border pixels, half a pixel and one pixel beyond them, their centres, and far away."""
    inputs = feed(1)
    edges = [-1e30, -1e4, -1.5, -1.0, 0.0, 1.0, 1.5, 1e4, 1e30]
    for height, width in LEVELS:
        edges += [sign * (1 + shift / size) for size in (height, width) for sign in (-1, 1) for shift in (-2, -1, 1, 2)]
    pairs = np.array([(x, y) for x in edges for y in edges], np.float32)
    room = inputs["grids"].size // 2
    for start in range(0, len(pairs), room):
        part = pairs[start : start + room]
        inputs["grids"].reshape(-1, 2)[: len(part)] = part
        expected = computed(attention(), inputs)
        np.testing.assert_allclose(computed(by_rows(), inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_point_that_is_no_number_counts_as_one_outside() -> None:
    """Paddle's grid_sampler reads out of bounds there, and the process crashes."""
    inputs = feed(2)
    point = (1, 2, 0, 1, 1)
    inputs["grids"][point] = [-3, 0.1]
    expected = computed(attention(), inputs)
    inputs["grids"][point] = [np.nan, 0.1]
    np.testing.assert_allclose(computed(by_rows(), inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"mode": "nearest"}, {"padding_mode": "border"}, {"align_corners": True}])
def test_other_sampling_stays_as_it_is(options: dict) -> None:
    desc = attention(**options)
    before = desc.SerializeToString()
    assert samples_by_rows(attention()) and not samples_by_rows(desc)
    assert attend_by_rows(desc) == 0
    assert desc.SerializeToString() == before


@pytest.mark.parametrize(
    ("small", "large", "spread"),
    [
        ((-1, 3, 1, 1, 1, 2), (-1, 3, 2, 2, 5, 2), 1),
        ((-1, 3, 1, 1, 1, 1), (-1, 3, 2, 2, 5, 2), 1),
        ((-1, 1, 2, 1, 1, 2), (-1, 3, 2, 2, 5, 2), 0),  # two broadcast dimensions that are not adjacent
        ((1, 3, 2, 2, 5, 2), (-1, 3, 2, 2, 5, 2), 0),  # broadcast over the images
        ((-1, 3, 2, 2, 5, 2), (-1, 3, 2, 2, 5, 2), 0),
        ((-1, 3, 1, 2), (-1, 3, 5, 2), 0),  # oneDNN is already fast here
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_tensor_is_repeated_as_addition_and_product_would(small, large, spread: int, swapped: bool) -> None:
    import paddle

    program = paddle.static.Program()
    shapes = {"first": large, "second": small} if swapped else {"first": small, "second": large}
    with static_mode(), paddle.static.program_guard(program):
        one, two = (paddle.static.data(name, shape, "float32") for name, shape in shapes.items())
        output = one * two + one
        output.block._rename_var(output.name, "output")
    rng = np.random.default_rng(0)
    sizes = {name: [2 if size < 0 else size for size in shape] for name, shape in shapes.items()}
    inputs = {name: rng.random(size, np.float32) for name, size in sizes.items()}
    desc = parsed(program.desc.serialize_to_string())
    expected = computed(desc, inputs)
    assert spread_for_onednn(desc) == spread * (1 if swapped else 2)
    np.testing.assert_array_equal(computed(desc, inputs), expected)
