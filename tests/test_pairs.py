"""Cross-layer equalization: which pairs are found, unchanged outputs, ranges by the published definition, the errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hard_models import harden, scaled_depthwise
from sample_fixtures import reader_of_scenes

from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.smooth_quant.algorithm import largest_difference, smooth_model
from act_pipeline.compress.smooth_quant.factors import Sample, layer_error, smoothing_factors
from act_pipeline.compress.smooth_quant.groups import (
    Reader,
    SmoothGroup,
    apply_factors,
    divided_tensors,
    find_groups,
    input_weights,
)
from act_pipeline.compress.smooth_quant.pairs import find_pairs
from act_pipeline.config import SmoothQuant, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import READER_CONFIG
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, 3, 12, 12)).astype(np.float32)


def hand_built(folder: Path, silu: bool = False, fetched: bool = False) -> InferenceModel:
    """Return convolutions w0 to w5 and matmuls w6, w7, in all the combinations that can be equalized, and a residual.

    ``silu``: w0 is followed by SiLU, not ReLU. ``fetched``: what w0 gives is an output too.
    """
    import paddle
    from paddle.nn import functional

    rng = np.random.default_rng(3)

    def parameter(name: str, *shape: int):
        value = paddle.nn.initializer.Assign(rng.standard_normal(shape).astype(np.float32) / 3)
        return paddle.create_parameter(list(shape), "float32", attr=paddle.ParamAttr(name, initializer=value))

    def conv(x, index: int, out: int, into: int, size: int, groups: int = 1):
        weight, bias = parameter(f"w{index}", out, into, size, size), parameter(f"b{index}", 1, out, 1, 1)
        return functional.conv2d(x, weight, padding=size // 2, groups=groups) + bias

    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 3, 12, 12], "float32")
        first = (functional.silu if silu else functional.relu)(conv(image, 0, 6, 3, 3))
        x = conv(first, 1, 8, 6, 1)  # nothing between this and a depthwise convolution
        x = functional.leaky_relu(conv(x, 2, 8, 1, 3, groups=8))
        # Read by a convolution, and after pooling and a concatenation by another one.
        y = functional.relu(conv(x, 3, 5, 8, 3))
        pooled = functional.max_pool2d(x, 3, 1, 1)
        x = conv(paddle.concat([y, pooled], 1), 4, 6, 13, 1)
        x = x + conv(x, 5, 6, 6, 1)  # a residual: neither w4 nor w5 can be scaled
        x = functional.relu(paddle.matmul(x.mean([2, 3]), parameter("w6", 6, 7)) + parameter("b6", 7))
        out = paddle.matmul(x, parameter("w7", 4, 7), transpose_y=True)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        folder.mkdir(parents=True, exist_ok=True)
        outputs = [out, first] if fetched else [out]
        paddle.static.save_inference_model(str(folder / "model"), [image], outputs, executor, program=main)
    return InferenceModel.load(folder)


def run(model: InferenceModel | StaticGraph) -> np.ndarray:
    import paddle

    graph = model if isinstance(model, StaticGraph) else StaticGraph.load(model)
    with paddle.static.scope_guard(graph.scope):
        return graph.executor.run(graph.program, feed={"image": images()}, fetch_list=graph.fetch_targets)[0]


def described(group: SmoothGroup) -> tuple[list[str], list[tuple[str, bool, bool, int]]]:
    readers = [(reader.weight, reader.transposed, reader.depthwise, reader.first) for reader in group.readers]
    return list(group.divided), readers


def test_pairs_of_the_hand_built_graph(tmp_path: Path) -> None:
    pairs = [
        (["w0", "b0"], [("w1", False, False, 0)]),
        (["w1", "b1"], [("w2", False, True, 0)]),
        (["w2", "b2"], [("w3", False, False, 0), ("w4", False, False, 5)]),
        (["w3", "b3"], [("w4", False, False, 0)]),
        (["w6", "b6"], [("w7", True, False, 0)]),
    ]
    with static_mode():
        graph = StaticGraph.load(hand_built(tmp_path / "m"))
        found = find_pairs(graph)
        assert [described(group) for group in found] == pairs
        assert [group.axis for group in found] == [1, 1, 1, 1, -1] and all(group.folds for group in found)
        # A pair is of no use where its reader stays float; one of two readers is enough.
        without = find_pairs(graph, exclude=[found[0].ops[0], found[3].ops[0]])
        assert [described(group) for group in without] == [pairs[1], pairs[2], pairs[4]]
        for name, changes in (("silu", {"silu": True}), ("fetched", {"fetched": True})):
            blocked = StaticGraph.load(hand_built(tmp_path / name, **changes))
            blocked.unwrap_outputs()
            assert [described(group) for group in find_pairs(blocked)] == pairs[1:]
        assert not find_groups(graph)


def test_one_run_calibrates_the_equalized_model_too(tmp_path: Path) -> None:
    """Powers of two do not round, so that both ways write the same file."""
    rng = np.random.default_rng(0)
    config = tmp_path / "c.yml"
    types = "quantize_op_types: [conv2d, depthwise_conv2d, matmul_v2]"
    config.write_text(f"Global: {{reader_config: {READER_CONFIG}, model_dir: {tmp_path}}}\nQuantPost: {{{types}}}\n")
    with static_mode():
        model = hand_built(tmp_path / "m")
        graph = StaticGraph.load(model)
        groups = find_pairs(graph)
        factors = {
            group.activation: np.exp2(rng.integers(-6, 7, group.channels)).astype(np.float32) for group in groups
        }
        for group in groups:
            apply_factors(graph, group, factors[group.activation])
        equal = graph.save(tmp_path / "s")
        divided = divided_tensors(StaticGraph.load(model), groups, factors)
        written = []
        for source, given in ((equal, None), (model, divided)):
            post = PostTraining(source, load_config(config), lambda: iter([{"image": images()}]), divided=given)
            for found in [post] if given is None else [post.equalized(equal, None), post]:
                (tmp_path / f"int8_{len(written)}").mkdir()
                made = found.write(tmp_path / f"int8_{len(written)}")
                written.append((made.model.content_hash(), made.thresholds, made.corrected_biases))
    assert written[0] == written[1] and written[0][0] != written[2][0]
    assert written[0][1] != written[2][1] and written[0][2] == 7
    # What the convolutions after the pooling and the concatenation read has the factors of both.
    both = next(tensor for tensor in divided.values() if len(tensor.by) == 13)
    np.testing.assert_array_equal(both.by, np.concatenate([factors[groups[i].activation] for i in (3, 2)]))


@pytest.mark.parametrize("exact", [True, False])
def test_pairs_leave_outputs_as_they_were(tmp_path: Path, exact: bool) -> None:
    rng = np.random.default_rng(0)
    with static_mode():
        model = hand_built(tmp_path / "m")
        graph, plain = StaticGraph.load(model), StaticGraph.load(model)
        for group in find_pairs(graph):
            factors = np.exp2(rng.integers(-6, 7, group.channels)).astype(np.float32)
            apply_factors(graph, group, factors if exact else factors * np.float32(1.3))
        for name in (f"{kind}{index}" for kind in "wb" for index in (0, 1, 2, 3)):
            assert (graph.parameter(name) != plain.parameter(name)).any()
        expected, found = run(plain), run(graph.save(tmp_path / "s"))
    if exact:
        np.testing.assert_array_equal(found, expected)
    else:
        assert 0 < np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_equalized_ranges_are_the_published_ones() -> None:
    """Nagel et al. 2019, equations 9 to 11: with ``s = sqrt(r1 r2) / r2``, both ranges become ``sqrt(r1 r2)``."""
    rng = np.random.default_rng(0)
    r1, r2 = (np.exp(2 * rng.standard_normal(16)) for _ in range(2))
    factors = smoothing_factors(r1, r2, 0.5)
    published = np.sqrt(r1 * r2) / r2
    common = factors / published  # the precision of a channel does not depend on a factor that all have
    np.testing.assert_allclose(common, common[0], rtol=1e-12)
    np.testing.assert_allclose(r1 / factors * common, np.sqrt(r1 * r2), rtol=1e-12)
    np.testing.assert_allclose(r2 * factors / common, np.sqrt(r1 * r2), rtol=1e-12)


def int8(values: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    step = np.asarray(limit, np.float64) / 127
    return np.clip(np.rint(values / step), -128, 127) * step


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_error_of_a_convolution_is_plain_numpys(depthwise: bool) -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((64, 6)).astype(np.float32)
    factors = np.exp(rng.normal(size=6)).astype(np.float32)
    weight = rng.standard_normal((6, 1, 3, 3) if depthwise else (5, 8, 3, 3)).astype(np.float32)
    reader = Reader("", "", depthwise=depthwise, first=0 if depthwise else 2)
    part = weight if depthwise else weight[:, 2:]
    scaled = part * (factors[:, None, None, None] if depthwise else factors[:, None, None])
    rounded = int8(scaled, np.abs(scaled).max(axis=(1, 2, 3), keepdims=True))
    values = int8(rows / factors, np.abs(rows / factors).max())
    sums = "rc,cuij->rcij" if depthwise else "rc,ocij->roij"
    exact, found = np.einsum(sums, rows.astype(np.float64), part), np.einsum(sums, values, rounded)
    axes = (0, 2, 3) if depthwise else None  # each channel of a depthwise convolution counts alike
    expected = (((found - exact) ** 2).sum(axis=axes) / (exact**2).sum(axis=axes)).mean()
    sample = Sample(np.abs(rows).max(axis=0)[None], rows, np.zeros(64, np.int64))
    error = layer_error(sample, sample, [input_weights(weight, reader, 6)], factors, "abs_max")
    assert error == pytest.approx(expected, rel=1e-2)


def test_depthwise_channels_of_very_different_ranges_are_equalized(
    sample_model: InferenceModel, tmp_path: Path
) -> None:
    make_sample(tmp_path / "data", 8, 4, seed=0, size=256)
    reader = reader_of_scenes(tmp_path / "data")

    def batches():
        for batch in reader.loader("train", batch_size=4, shuffle=False, drop_last=False):
            yield {name: batch[name] for name in ("image", "im_shape", "scale_factor")}

    with static_mode():
        hard, changed = harden(sample_model, tmp_path / "hard", scaled_depthwise)
        smoothed = smooth_model(hard, batches, tmp_path / "s", SmoothQuant(sample_rows=128, search_alpha_min=0.95))
        feed = {name: value[:1] for name, value in next(batches()).items()}
        assert largest_difference(outputs(hard, feed), outputs(smoothed.model, feed)) <= 1e-4
        kinds = [sorted(op.type for op in StaticGraph.load(model).program.global_block().ops)
                 for model in (hard, smoothed.model)]  # fmt: skip
        depthwise = {op.output_arg_names[0] for op in StaticGraph.load(hard).program.global_block().ops
                     if op.type == "depthwise_conv2d"}  # fmt: skip
    layers = [layer for layer in smoothed.layers if len(layer.ops) == 1 and set(layer.ops) <= depthwise]
    # One depthwise convolution more follows a ReLU, and has not been scaled.
    repaired = [layer for layer in layers if layer.sqnr_before_db < 12]
    assert len(layers) - 1 == len(repaired) == changed == 9
    # Each half of the eight images is rounded with the factors of the other one.
    assert all(layer.smoothed and layer.folded and layer.sqnr_after_db > 25 for layer in repaired)
    # Only the multiplications for LayerNorms with residuals are new.
    assert len(kinds[1]) - len(kinds[0]) == sum(layer.smoothed and not layer.folded for layer in smoothed.layers)


def outputs(model: InferenceModel, feed) -> list[np.ndarray]:
    import paddle

    graph = StaticGraph.load(model)
    with paddle.static.scope_guard(graph.scope):
        return graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
