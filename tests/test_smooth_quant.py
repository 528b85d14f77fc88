"""SmoothQuant: the formula compared with NumPy, the groups, unchanged outputs, and outliers that it repairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hard_models import scaled_norms
from sample_fixtures import reader_of_scenes

from act_pipeline.calibration.observers import NotFiniteError
from act_pipeline.calibration.row_sample import ChannelAbsMax, RowSample
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.smooth_quant import algorithm
from act_pipeline.compress.smooth_quant.algorithm import gather_rows, largest_difference, smooth_model
from act_pipeline.compress.smooth_quant.factors import (
    Sample,
    layer_error,
    powers_of_two,
    search,
    smoothed_threshold,
    smoothing_factors,
)
from act_pipeline.compress.smooth_quant.groups import SmoothGroup, apply_factors, find_groups
from act_pipeline.config import SmoothQuant, load_config
from act_pipeline.config.schema import Source, build
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import READER_CONFIG
from act_pipeline.graph.folding import prepare
from act_pipeline.graph.int8_rounding import sqnr_db
from act_pipeline.graph.static_graph import StaticGraph, static_mode

CHANNELS = 8


# ---- factors, errors, the search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_the_papers_but_for_one_common_number(alpha: float) -> None:
    rng = np.random.default_rng(0)
    act, weight = np.exp(rng.normal(size=32) * 2), np.exp(rng.normal(size=32))
    found = smoothing_factors(act, weight, alpha)
    ratio = found / (act**alpha / weight ** (1 - alpha))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert np.exp(np.log(found).mean()) == pytest.approx(1)


def test_factors_of_dead_channels_and_weights_stay_in_bounds() -> None:
    act, weight = np.array([0.0, 1.0, 1.0, 1e30]), np.array([1.0, 0.0, 1.0, 1.0])
    for alpha in (0.0, 0.5, 1.0):
        found = smoothing_factors(act, weight, alpha)
        assert np.isfinite(found).all() and (found >= 2.0**-16).all() and (found <= 2.0**16).all()
        assert found[0] == 1
    assert (smoothing_factors(np.zeros(3), np.ones(3), 0.5) == 1).all()
    assert (smoothing_factors(np.ones(3), np.zeros(3), 0.5) == 1).all()


def test_powers_of_two_are_the_nearest() -> None:
    np.testing.assert_array_equal(powers_of_two(np.array([1.0, 1.4, 1.5, 0.3, 1000.0])), [1, 1, 2, 0.25, 1024])


def sample_of(rows: np.ndarray, images: int = 4) -> Sample:
    image = np.arange(len(rows)) * images // len(rows)
    by_image = np.stack([np.abs(rows[image == index]).max(axis=0) for index in range(images)])
    return Sample(by_image, rows, image)


def outliers(rows: int = 256, size: float = 100.0) -> np.ndarray:
    """Return [rows, CHANNELS] with a large channel 2."""
    values = np.random.default_rng(1).standard_normal((rows, CHANNELS)).astype(np.float32)
    values[:, 2] *= size
    return values


def matrix(weight: np.ndarray) -> np.ndarray:
    """Return the weight of a matmul, [channels, out], as the search takes it."""
    return weight[None, :, :, None]


def int8(values: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    step = np.asarray(limit, np.float64) / 127
    return np.clip(np.rint(values / step), -128, 127) * step


def test_the_error_is_plain_numpys() -> None:
    rng = np.random.default_rng(2)
    rows, factors = outliers(), np.exp(rng.normal(size=CHANNELS)).astype(np.float32)
    weights = [rng.standard_normal((CHANNELS, out)).astype(np.float32) for out in (5, 3)]
    sample = sample_of(rows)
    expected = []
    for weight in weights:
        scaled = weight * factors[:, None]
        exact = rows.astype(np.float64) @ weight
        divided = rows / factors
        found = int8(divided, np.abs(divided).max()) @ int8(scaled, np.abs(scaled).max(axis=0))
        expected.append(((found - exact) ** 2).sum() / (exact**2).sum())
    matrices = [matrix(weight) for weight in weights]
    assert layer_error(sample, sample, matrices, factors, "abs_max") == pytest.approx(np.mean(expected), rel=1e-2)


def test_thresholds_of_smoothed_activations_are_those_of_calibration() -> None:
    rows, factors = outliers(), np.linspace(0.5, 20, CHANNELS).astype(np.float32)
    each = np.abs(rows / factors).reshape(4, -1).max(axis=1)
    assert smoothed_threshold(sample_of(rows), factors, "abs_max") == pytest.approx(each.max())
    assert smoothed_threshold(sample_of(rows), factors, "avg") == pytest.approx(each.mean())
    assert smoothed_threshold(sample_of(rows), factors, "hist", 0.5) == pytest.approx(
        np.median(np.abs(rows / factors)), rel=0.01
    )


@pytest.mark.parametrize("algo", ["abs_max", "avg", "hist", "mse", "KL"])
def test_the_search_repairs_outliers_and_is_no_worse_than_any_alpha(algo: str) -> None:
    rows = outliers(1024)
    weight = np.random.default_rng(3).standard_normal((CHANNELS, 16)).astype(np.float32)
    weight[2] /= 100
    alphas = SmoothQuant().alphas
    choice = search(sample_of(rows), [matrix(weight)], alphas, algo)
    assert choice is not None and choice.improvement > 0.9
    assert sqnr_db(choice.error_after) > sqnr_db(choice.error_before) + 10
    fixed = [search(sample_of(rows), [matrix(weight)], [alpha], algo).error_after for alpha in alphas]
    assert choice.error_after <= 1.2 * min(fixed)
    rounded = search(sample_of(rows), [matrix(weight)], alphas, algo, rounded=True)
    assert set(np.log2(rounded.factors) % 1) == {0.0} and rounded.improvement > 0.9


def test_the_error_is_measured_on_other_images_than_it_was_chosen_by() -> None:
    sample = sample_of(outliers(64))
    first, second = sample.halves()
    assert set(first.image) == {0, 2} and set(second.image) == {1, 3}
    assert first.by_image.shape == (2, CHANNELS)
    one = Sample(sample.by_image[:1], sample.rows, np.zeros(64, np.int64))
    assert [len(half.rows) for half in one.halves()] == [32, 32]
    single = Sample(sample.by_image[:1], sample.rows[:1], np.zeros(1, np.int64))
    assert [len(half.rows) for half in single.halves()] == [1, 1]


def test_nothing_is_chosen_where_all_is_zero() -> None:
    weight = np.ones((CHANNELS, 2), np.float32)
    assert search(sample_of(np.zeros((8, CHANNELS), np.float32)), [matrix(weight)], [0.5], "mse") is None
    assert search(sample_of(outliers(8)), [matrix(0 * weight)], [0.5], "mse") is None


# ---- observers -------------------------------------------------------------------------------------------------------


def test_a_row_sample_is_the_same_in_any_batches_and_every_row_is_as_likely() -> None:
    values = np.repeat(np.arange(6 * 50, dtype=np.float32).reshape(6, 50, 1), 3, axis=2)
    whole, parts = RowSample(40), RowSample(40)
    whole.update(values, 6)
    for start in range(0, 6, 2):
        parts.update(values[start : start + 2], 2)
    np.testing.assert_array_equal(whole.values, parts.values)
    np.testing.assert_array_equal(whole.image, parts.image)
    np.testing.assert_array_equal(whole.values[:, 0] // 50, whole.image)
    assert len(set(whole.values[:, 0])) == 40
    counts = np.zeros(6)
    for seed in range(100):
        sampled = RowSample(40, seed)
        for start in range(0, 6, 3):
            sampled.update(values[start : start + 3], 3)
        counts += np.bincount(sampled.image, minlength=6)
    assert np.abs(counts / 4000 - 1 / 6).max() < 0.02


def test_channel_maxima_are_numpys_image_by_image() -> None:
    values = np.random.default_rng(0).standard_normal((6, 5, CHANNELS)).astype(np.float32)
    observer = ChannelAbsMax()
    observer.update(values[:4], 4)
    observer.update(values[4:], 2)
    np.testing.assert_array_equal(observer.by_image, np.abs(values).max(axis=1))
    np.testing.assert_array_equal(observer.abs_max, np.abs(values).max(axis=(0, 1)))
    with pytest.raises(NotFiniteError, match="NaN"):
        observer.update(values * np.nan, 6)


# ---- a hand-built graph ----------------------------------------------------------------------------------------------


def hand_built(folder: Path, size: float = 1.0) -> InferenceModel:
    """Return a norm shared by a residual and two matmuls (one with a transposed weight), then one read only by matmuls.

    ``size`` is the factor of channel 2 of both norms, which the weights and the residual compensate.
    """
    import paddle

    rng = np.random.default_rng(3)
    large = np.ones(CHANNELS, np.float32)
    large[2] = size

    def parameter(name: str, value: np.ndarray):
        value = value.astype(np.float32)
        return paddle.create_parameter(
            list(value.shape), "float32", attr=paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(value))
        )

    def norm(value, name: str):
        gamma = parameter(f"{name}.gamma", (1 + 0.1 * rng.standard_normal(CHANNELS)) * large)
        beta = parameter(f"{name}.beta", 0.1 * rng.standard_normal(CHANNELS) * large)
        return paddle.nn.functional.layer_norm(value, [CHANNELS], gamma, beta)

    def weight(name: str, out: int, turned: bool = False):
        value = rng.standard_normal((CHANNELS, out)) / large[:, None]
        return parameter(name, value.T if turned else value)

    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 10, CHANNELS], "float32")
        x = norm(image, "first")
        a = paddle.matmul(x, weight("w0", CHANNELS))
        b = paddle.matmul(x, weight("w1", CHANNELS, turned=True), transpose_y=True)
        x = x * parameter("back", 1 / large) + paddle.nn.functional.relu(a) + b
        x = norm(x, "second")
        y = paddle.matmul(x, weight("w2", 6))
        z = paddle.matmul(x.transpose([1, 0, 2]), weight("w3", 6, turned=True), transpose_y=True).transpose([1, 0, 2])
        out = paddle.matmul(paddle.nn.functional.relu(y + z), parameter("w4", rng.standard_normal((6, 5))))
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        folder.mkdir(parents=True, exist_ok=True)
        paddle.static.save_inference_model(str(folder / "model"), [image], [out], executor, program=main)
    return InferenceModel.load(folder)


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, 10, CHANNELS)).astype(np.float32)


def feeds():
    yield {"image": images()[:8]}
    yield {"image": images()[8:]}


def run(model: InferenceModel | StaticGraph, image: np.ndarray) -> np.ndarray:
    import paddle

    graph = model if isinstance(model, StaticGraph) else StaticGraph.load(model)
    with paddle.static.scope_guard(graph.scope):
        return graph.executor.run(graph.program, feed={"image": image}, fetch_list=graph.fetch_targets)[0]


def weights_of(group: SmoothGroup) -> dict[str, bool]:
    """Return weight -> whether it is transposed."""
    return {reader.weight: reader.transposed for reader in group.readers}


def test_groups_of_the_hand_built_graph(tmp_path: Path) -> None:
    with static_mode():
        graph = StaticGraph.load(hand_built(tmp_path / "m"))
        shared, folding = find_groups(graph)
        assert [(weights_of(group), group.folds) for group in (shared, folding)] == [
            ({"w0": False, "w1": True}, False),
            ({"w2": False, "w3": True}, True),
        ]
        assert shared.activation == shared.source and folding.activation == folding.source
        assert [weights_of(group) for group in find_groups(graph, smooth_all_linears=True)][2:] == [{"w4": False}]
        # If a matmul is excluded, the factors cannot be folded into the norm.
        without = find_groups(graph, exclude=folding.ops[:1])[1]
        assert (weights_of(without), without.folds) == ({"w3": True}, False)
        # The same holds if the norm is itself an output of the model.
        graph.fetch_targets.append(graph.program.global_block().var(folding.source))
        assert [group.folds for group in find_groups(graph)] == [False, False, False]


@pytest.mark.parametrize("exact", [True, False])
def test_factors_leave_outputs_as_they_were(tmp_path: Path, exact: bool) -> None:
    with static_mode():
        model = hand_built(tmp_path / "m")
        graph, plain = StaticGraph.load(model), StaticGraph.load(model)
        rng = np.random.default_rng(0)
        factors = np.exp2(rng.integers(-6, 7, CHANNELS)).astype(np.float32)
        factors = factors if exact else factors * rng.uniform(0.7, 1.4, CHANNELS).astype(np.float32)
        for group in find_groups(graph):
            apply_factors(graph, group, factors)
        np.testing.assert_array_equal(graph.parameter("w0"), plain.parameter("w0") * factors[:, None])
        np.testing.assert_array_equal(graph.parameter("w3"), plain.parameter("w3") * factors)
        np.testing.assert_allclose(graph.parameter("second.gamma"), plain.parameter("second.gamma") / factors, 1e-6)
        np.testing.assert_array_equal(graph.parameter("first.gamma"), plain.parameter("first.gamma"))
        kinds = [[op.type for op in one.program.global_block().ops].count("elementwise_mul") for one in (plain, graph)]
        assert kinds[1] == kinds[0] + 1
        expected, found = run(plain, images()), run(graph.save(tmp_path / "s"), images())
    if exact:
        np.testing.assert_array_equal(found, expected)
    else:
        assert 0 < np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def config_for(model: InferenceModel, folder: Path, count: int = 16):
    path = folder / "ptq.yml"
    path.write_text(
        f"Global: {{reader_config: {READER_CONFIG}, model_dir: {model.directory}, Evaluation: false}}\n"
        f"Strategy: {{name: ptq}}\nQuantPost: "
        f"{{calib_images: {count}, quantize_op_types: [conv2d, depthwise_conv2d, matmul_v2]}}\n"
    )
    return load_config(path)


def test_outliers_that_break_int8_are_repaired(tmp_path: Path) -> None:
    with static_mode():
        model = hand_built(tmp_path / "m", size=300)
        smoothed = smooth_model(model, feeds, tmp_path / "s", SmoothQuant())
        assert [layer.smoothed for layer in smoothed.layers] == [True, True] and smoothed.images == 16
        assert [layer.folded for layer in smoothed.layers] == [False, True]
        expected = run(model, images())

        def noise_db(model: InferenceModel, folder: Path) -> float:
            folder.mkdir()
            made = PostTraining(model, config_for(model, tmp_path), feeds).write(folder)
            assert made.inventory.quantized == {"matmul_v2": 5} and made.inventory.kept == []
            return sqnr_db(float(((run(made.model, images()) - expected) ** 2).sum() / (expected**2).sum()))

        plain, repaired = noise_db(model, tmp_path / "p"), noise_db(smoothed.model, tmp_path / "q")
    assert plain < 15 and repaired > 28
    for layer in smoothed.layers:
        assert 0 <= layer.alpha <= 1 and layer.sqnr_after_db > layer.sqnr_before_db + 15


def test_layers_that_gain_too_little_stay_as_they_are(tmp_path: Path) -> None:
    with static_mode():
        model = hand_built(tmp_path / "m")
        smoothed = smooth_model(model, feeds, tmp_path / "s", SmoothQuant(min_improvement=1.0))
    assert smoothed.model is model and smoothed.smoothed == [] and not (tmp_path / "s").exists()
    assert all("error" in layer.reason and not layer.folded for layer in smoothed.layers)


@pytest.mark.parametrize("always", [False, True])
def test_factors_that_change_the_outputs_are_rounded_or_taken_back(tmp_path: Path, monkeypatch, always: bool) -> None:
    seen = []

    def changed(expected, found) -> float:
        seen.append(float(np.abs(found[0] - expected[0]).max()))
        return 1.0 if always or len(seen) == 1 else seen[-1]

    monkeypatch.setattr(algorithm, "largest_difference", changed)
    with static_mode():
        model = hand_built(tmp_path / "m", size=300)
        smoothed = smooth_model(model, feeds, tmp_path / "s", SmoothQuant())
    assert seen[0] > 0 and seen[1] == 0
    if always:
        assert smoothed.model is model and smoothed.smoothed == [] and "change" in smoothed.layers[0].reason
    else:
        assert smoothed.powers_of_two and len(smoothed.smoothed) == 2 and smoothed.difference == 0


def test_detections_are_compared_as_sets() -> None:
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.integers(0, 3, 20), rng.random(20), rng.random((20, 4)) * 256])
    count = np.array([20.0])
    assert largest_difference([boxes, count], [boxes[::-1], count]) == 0
    moved = boxes.copy()
    moved[3, 1] += 0.01
    assert largest_difference([boxes, count], [moved, count]) == pytest.approx(0.01)
    moved[3, 0] += 7
    assert largest_difference([boxes, count], [moved, count]) == np.inf
    assert largest_difference([boxes, count], [boxes * np.nan, count]) == np.inf
    assert largest_difference([boxes, count], [boxes[:5], count]) == np.inf
    assert largest_difference([np.array([4.0, -8.0])], [np.array([4.0, -6.0])]) == 0.25


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_no_image_and_damaged_images_are_said_in_one_line(tmp_path: Path) -> None:
    with static_mode():
        model = hand_built(tmp_path / "m")
        with pytest.raises(UserError, match="no calibration image .* expected one at least"):
            smooth_model(model, lambda: iter(()), tmp_path / "s", SmoothQuant())
        groups = find_groups(StaticGraph.load(model))
        with pytest.raises(UserError, match=r"tensor layer_norm_0.*read by matmul_v2 .*NaN"):
            gather_rows(model, groups, iter([{"image": images() * np.nan}]))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"alpha": 1.5}, "SmoothQuant.alpha"),
        ({"search_alpha_min": 0.9, "search_alpha_max": 0.2}, "search_alpha_min is 0.9, expected at most"),
        ({"search_alpha_step": 0}, "search_alpha_step"),
        ({"calib_images": 0}, "calib_images"),
        ({"smooth_all_linear": True}, "did you mean 'smooth_all_linears'"),
    ],
)
def test_settings_are_checked(content: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(SmoothQuant, content, Source(Path("c.yml")), "SmoothQuant")


def test_alphas() -> None:
    assert SmoothQuant(alpha=0.5).alphas == [0.5]
    assert len(SmoothQuant().alphas) == 20 and SmoothQuant().alphas[-1] == 0.95
    assert SmoothQuant(search_alpha_min=0.2, search_alpha_max=0.8, search_alpha_step=0.25).alphas == [
        0.2, 0.45, 0.7, 0.8,
    ]  # fmt: skip


# ---- the sample ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(sample_model: InferenceModel, tmp_path_factory: pytest.TempPathFactory):
    """The sample's prepared float model, and a reader of a few scenes."""
    root = tmp_path_factory.mktemp("smooth")
    make_sample(root / "data", 24, 40, seed=0, size=256)
    with static_mode():
        return prepare(sample_model, root / "float"), reader_of_scenes(root / "data")


def batches_of(reader: Reader, count: int):
    def batches():
        for batch in reader.loader("train", batch_size=4, shuffle=False, drop_last=False, images=count):
            yield {name: batch[name] for name in ("image", "im_shape", "scale_factor")}

    return batches


def outputs(model: InferenceModel, feed) -> list[np.ndarray]:
    import paddle

    graph = StaticGraph.load(model)
    with paddle.static.scope_guard(graph.scope):
        return graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)


def test_groups_of_the_sample(sample) -> None:
    with static_mode():
        groups = find_groups(StaticGraph.load(sample[0]))
    assert [(len(group.ops), group.source) for group in groups] == [
        (1, "layer_norm_0.tmp_2"),  # the encoder's FFN
        (2, "layer_norm_2.tmp_2"),  # the heads of the encoder, then q and k, then v of the first decoder layer
        (2, "layer_norm_2.tmp_2"),
        (1, "layer_norm_2.tmp_2"),
        (2, "layer_norm_3.tmp_2"),  # offsets and weights of the deformable attention
        (1, "layer_norm_4.tmp_2"),  # its FFN
        (2, "layer_norm_5.tmp_2"),  # the box head and the next v, then the next q and k
        (2, "layer_norm_5.tmp_2"),
        (2, "layer_norm_6.tmp_2"),
        (1, "layer_norm_7.tmp_2"),
        (2, "layer_norm_8.tmp_2"),  # the last heads
    ]
    assert [group.folds for group in groups] == [False] * 10 + [True]
    assert len({name for group in groups for name in group.ops}) == 18


def test_the_sample_computes_the_same_and_can_be_lowered(sample, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from act_pipeline.onnx_export import lowered_onnx

    model, reader = sample
    feed = {name: value[:1] for name, value in next(batches_of(reader, 4)()).items()}
    with static_mode():
        smoothed = smooth_model(model, batches_of(reader, 16), tmp_path / "s", SmoothQuant(calib_images=8))
        assert smoothed.images == 8 and len(smoothed.layers) == 48 + 11
        assert len([layer for layer in smoothed.smoothed if layer.source.startswith("layer_norm")]) >= 4
        assert 0 < smoothed.difference <= 1e-4 and not smoothed.powers_of_two
        found = largest_difference(outputs(model, feed), outputs(smoothed.model, feed))
        assert found == pytest.approx(smoothed.difference, abs=1e-6)
        (tmp_path / "int8").mkdir()
        made = PostTraining(smoothed.model, config_for(model, tmp_path, 8), batches_of(reader, 8)).write(
            tmp_path / "int8"
        )
    assert made.inventory.kept == []
    for target in ("cpu", "tensorrt"):
        record = lowered_onnx(made.model, target).record()
        assert record["kept"] == [] and record["quantized"]["matmul_v2"] == made.inventory.quantized["matmul_v2"]


@pytest.mark.slow
def test_smoothing_gives_the_sample_its_accuracy_back(sample, tmp_path: Path) -> None:
    from act_pipeline.engines import create_engine
    from act_pipeline.evaluation import evaluate

    model, reader = sample
    with static_mode():
        graph = StaticGraph.load(model)
        assert scaled_norms(graph) == 6
        (tmp_path / "hard").mkdir()
        hard = graph.save(tmp_path / "hard")
        smoothed = smooth_model(hard, batches_of(reader, 24), tmp_path / "s", SmoothQuant())
        maps = {}
        for name, floating in (("plain", hard), ("smoothed", smoothed.model)):
            (tmp_path / name).mkdir()
            made = PostTraining(floating, config_for(model, tmp_path, 24), batches_of(reader, 24)).write(
                tmp_path / name
            )
            maps[name] = evaluate(create_engine("paddle", made.model, "int8", "CPU"), reader, progress=False).map
        maps["fp32"] = evaluate(create_engine("paddle", hard, "fp32", "CPU"), reader, progress=False).map
    assert maps["plain"] < maps["fp32"] - 0.05
    assert maps["smoothed"] > maps["fp32"] - 0.01
