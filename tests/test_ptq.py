"""Post-training quantization: observers and thresholds compared with NumPy, and the models written from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from act_pipeline.calibration import AbsHistogram, AbsMax, ChannelMean, Divided, collect, quantizable_tensors
from act_pipeline.calibration.algorithms import ALGORITHMS
from act_pipeline.calibration.algorithms.kl import kl_threshold
from act_pipeline.calibration.algorithms.mse import mse_threshold
from act_pipeline.calibration.histograms import uniform_histogram
from act_pipeline.calibration.observers import DividedHistogram, NotFiniteError
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.compress import compress
from act_pipeline.compress.ptq.bias_correction import Bias, correct_biases, find_biases, output_shift
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.config import load_config
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.demo import READER_CONFIG
from act_pipeline.engines.interface import EngineSupport
from act_pipeline.graph.int8_rounding import unsigned_range, weight_threshold
from act_pipeline.graph.static_graph import StaticGraph, static_mode

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
CONFIG = """
Global: {{reader_config: {reader}, model_dir: {model}, Evaluation: {evaluation}}}
Strategy: {{name: ptq}}
QuantPost: {{calib_images: {images}, algo: {algo}, bias_correction: {bias_correction}}}
"""


# ---- observers and thresholds ----------------------------------------------------------------------------------------


def tensors() -> dict[str, np.ndarray]:
    """Return tensors [images, values] with the distributions of activations."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((12, 6000)).astype(np.float32)
    outlier = normal.copy()
    outlier[11, 5] = 1e6
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "softmax": (np.exp(8 * normal) / np.exp(8 * normal).sum(1, keepdims=True)).astype(np.float32),
        "growing": normal * np.exp2(np.arange(12, dtype=np.float32))[:, None],
        "shrinking": normal * np.exp2(-np.arange(12, dtype=np.float32))[:, None],
        "outlier": outlier,
        "constant": np.full((12, 50), -0.37, np.float32),
        "tiny": normal * np.float32(1e-30),
        "huge": normal * np.float32(1e30),
        "zeros": np.zeros((12, 50), np.float32),
        "first images zero": np.concatenate([np.zeros((6, 50), np.float32), normal[:6, :50]]),
    }


def seen(values: np.ndarray, batch: int = 3) -> AbsHistogram:
    observer = AbsHistogram()
    for start in range(0, len(values), batch):
        part = values[start : start + batch]
        observer.update(part, len(part))
    return observer


def int8(values: np.ndarray, limit: float) -> np.ndarray:
    """Return the values rounded to INT8 with a threshold."""
    step = limit / 127
    return np.clip(np.rint(values.astype(np.float64) / step), -128, 127) * step


@pytest.mark.parametrize("name", tensors())
def test_abs_max_and_avg_are_numpys(name: str) -> None:
    values = tensors()[name]
    observer = seen(values)
    assert observer.images == 12
    assert threshold(observer, "abs_max") == np.abs(values).max()
    assert threshold(observer, "avg") == pytest.approx(np.abs(values).max(1).mean(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("name", sorted(set(tensors()) - {"zeros"}))
def test_hist_is_numpys_quantile(name: str, share: float) -> None:
    values = np.abs(tensors()[name].astype(np.float64)).reshape(-1)
    expected = np.quantile(values, share, method="inverted_cdf")
    if expected < values.max() * 2.0**-23:  # more than this share is practically 0, then the maximum is used
        expected = values.max()
    assert threshold(seen(tensors()[name]), "hist", share) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", sorted(set(tensors()) - {"zeros"}))
def test_mse_has_the_least_error_of_all_thresholds(name: str) -> None:
    values = tensors()[name].reshape(-1)
    found = threshold(seen(tensors()[name]), "mse")

    def error(limit: float) -> float:
        return float(((int8(values, limit) - values) ** 2).sum(dtype=np.float64))

    largest = float(np.abs(values).max())
    least = min(error(largest * share) for share in np.exp2(-np.arange(0, 6, 0.02)))
    assert error(found) <= 1.03 * least + 1e-9 * largest**2


@pytest.mark.parametrize(("shape", "axis"), [((4, 6, 9, 7), 1), ((4, 50, 8), -1), ((4, 8), 1), ((2, 3, 40), 1)])
@pytest.mark.parametrize(("sample", "images"), [(None, 2), (20, 2), (20, 1)])
def test_a_divided_histogram_is_the_histogram_of_divided_values(
    shape: tuple[int, ...], axis: int, sample: int | None, images: int
) -> None:
    rng = np.random.default_rng(3)
    by = np.exp(rng.uniform(-3, 3, shape[axis])).astype(np.float32)
    plain = AbsHistogram(sample)
    slow, quick = Divided(plain, by, axis), DividedHistogram(sample, by, axis)
    for scale in (1, 40, 0.1):
        values = (scale * rng.standard_normal(shape)).astype(np.float32)
        slow.update(values, images)
        quick.update(values, images)
    assert (quick.abs_max, quick.lowest, quick.mean_abs_max) == (plain.abs_max, plain.lowest, plain.mean_abs_max)
    assert quick.images == plain.images == 3 * images
    for found, expected in zip(quick.bins(), plain.bins()):
        np.testing.assert_array_equal(found, expected)
    values[0] = np.inf
    with pytest.raises(NotFiniteError, match="infinite"):
        quick.update(values, images)


@pytest.mark.parametrize("power", [2, 2.4, 3])
@pytest.mark.parametrize("name", sorted(set(tensors()) - {"zeros"}))
def test_the_search_of_thresholds_that_ends_early_finds_the_least_error_of_all(name: str, power: float) -> None:
    observer = seen(tensors()[name])
    lower, upper, counts = observer.bins()
    values = (lower + upper) / 2
    for lowest in (None, 0.0, observer.lowest, -0.2 * observer.abs_max):

        def error(limit: float, lowest: float | None = lowest) -> float:
            step, _ = unsigned_range(limit, lowest)
            return float(counts @ np.abs(np.minimum(np.rint(values / step) * step, limit) - values) ** power)

        limits = upper[-1] * np.exp2(-np.arange(97) / 16)
        errors = [error(limit) for limit in limits]
        found = mse_threshold(lower, upper, counts, lowest, power)
        assert found in limits and error(found) == pytest.approx(min(errors), rel=1e-9)


@pytest.mark.parametrize("name", sorted(set(tensors()) - {"zeros"}))
def test_kl_is_paddles(name: str) -> None:
    from paddle.static.quantization.cal_kl_threshold import cal_kl_threshold

    values = np.abs(tensors()[name].astype(np.float64)).reshape(-1)
    bins = 512  # instead of PaddleSlim's 2,048, whose loops take seconds
    counts, edges = np.histogram(values, bins=bins, range=(0, values.max()))
    found = kl_threshold(counts.astype(np.float64), edges[1])
    if counts[bins // 2 - 2 : -1].any():
        assert found == pytest.approx(cal_kl_threshold(counts, edges[1], 8), rel=1e-9)
    else:  # Paddle would clip the whole upper half
        assert found is None and name in ("constant", "outlier", "softmax")


@pytest.mark.parametrize("name", sorted(set(tensors()) - {"zeros"}))
def test_the_uniform_histogram_is_numpys(name: str) -> None:
    values = np.abs(tensors()[name].astype(np.float64)).reshape(-1)
    observer = seen(tensors()[name])
    found = uniform_histogram(*observer.bins(), 64)
    expected, _ = np.histogram(values, bins=64, range=(0, values.max()))
    assert found.sum() == values.size
    # Values within 1/2048 of an edge may be counted in the next bin.
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() <= 0.01 * values.size


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_constants_zeros_and_outliers(algo: str) -> None:
    assert threshold(seen(tensors()["constant"]), algo) == pytest.approx(0.37, rel=0.02)
    assert threshold(seen(tensors()["zeros"]), algo) == 0
    limit = threshold(seen(tensors()["outlier"]), algo)
    if algo == "hist":  # one in 72,000, which does not affect the quantile or its precision
        assert limit == pytest.approx(np.quantile(np.abs(tensors()["normal"]), 0.9999), rel=0.02)
    elif algo != "avg":
        assert limit > 1e5
    assert 0 < limit <= 1e6


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_neither_batches_nor_order_change_a_threshold(algo: str) -> None:
    values = tensors()["growing"]
    expected = threshold(seen(values, 3), algo)
    assert threshold(seen(values, 5), algo) == pytest.approx(expected, rel=1e-9)
    assert threshold(seen(values[::-1], 3), algo) == pytest.approx(expected, rel=1e-6)


def test_a_histogram_takes_no_more_memory_with_more_images() -> None:
    observer = AbsHistogram()
    rng = np.random.default_rng(0)
    sizes = set()
    for scale in (1e-20, 1.0, 1e20):
        observer.update(rng.standard_normal((2, 500)).astype(np.float32) * np.float32(scale), 2)
        sizes.add(observer._counts.nbytes)
    assert len(sizes) == 1 and sizes.pop() < 1 << 20
    assert observer.bins()[2].sum() == 3000


def test_channel_mean_is_numpys() -> None:
    values = np.random.default_rng(0).standard_normal((6, 5, 4, 3)).astype(np.float32)
    for axis in (1, -1):
        observer = ChannelMean(axis)
        observer.update(values[:4], 4)
        observer.update(values[4:], 2)
        others = tuple(other for other in range(4) if other != axis % 4)
        np.testing.assert_allclose(observer.mean, values.mean(axis=others, dtype=np.float64), rtol=1e-6)


# ---- a tiny graph ----------------------------------------------------------------------------------------------------


def tiny_graph(folder: Path, factor: float = 1.0) -> InferenceModel:
    """Return conv (grouped) + bias, relu, depthwise conv, matmul + bias, and a matmul of two activations."""
    import paddle

    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int):
        value = (rng.standard_normal(shape) * factor).astype(np.float32)
        return paddle.create_parameter(
            list(shape), "float32", attr=paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(value))
        )

    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 4, 12, 12], "float32")
        x = paddle.nn.functional.conv2d(image, weight("w0", 6, 2, 3, 3), groups=2) + weight("b0", 1, 6, 1, 1)
        x = paddle.nn.functional.relu(x)
        x = paddle.nn.functional.conv2d(x, weight("w1", 6, 1, 3, 3), groups=6) + weight("b1", 1, 6, 1, 1)
        x = x.flatten(2).transpose([0, 2, 1])  # [N, 64, 6]
        y = paddle.matmul(x, weight("w2", 6, 5)) + weight("b2", 5)
        out = paddle.matmul(paddle.nn.functional.softmax(y), y, transpose_y=True)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        folder.mkdir(parents=True, exist_ok=True)
        paddle.static.save_inference_model(str(folder / "model"), [image], [out], executor, program=main)
    return InferenceModel.load(folder)


OPS = ("conv2d", "depthwise_conv2d", "matmul_v2")


def images(count: int = 8) -> np.ndarray:
    return np.random.default_rng(5).random((count, 4, 12, 12)).astype(np.float32)


def run(graph: StaticGraph, names: list[str], image: np.ndarray) -> list[np.ndarray]:
    import paddle

    with paddle.static.scope_guard(graph.scope):
        return graph.executor.run(graph.program, feed={"image": image}, fetch_list=names)


@pytest.mark.parametrize("batch", [1, 3])
def test_collect_sees_what_the_graph_computes(tmp_path: Path, batch: int) -> None:
    with static_mode():
        model = tiny_graph(tmp_path / "m")
        graph = StaticGraph.load(model)
        readers = quantizable_tensors(graph, OPS)
        assert len(readers) == 5 and readers["image"].startswith("read by conv2d (")
        observers = {name: AbsHistogram() for name in readers}
        batches = [{"image": images()[start : start + batch]} for start in range(0, 8, batch)]
        seen_images = collect(model, {name: [observer] for name, observer in observers.items()}, batches)
        values = dict(zip(readers, run(graph, list(readers), images())))
    assert seen_images == 8
    for name, observer in observers.items():
        each = np.abs(values[name]).reshape(8, -1).max(1)
        assert observer.abs_max == pytest.approx(each.max(), rel=1e-5)
        assert threshold(observer, "avg") == pytest.approx(each.mean(), rel=1e-5)


@pytest.mark.parametrize("runtime", ["openvino", "paddle"])
def test_collect_of_the_image_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """Where only the image is quantized, the graph that is run has no parameters."""
    if runtime == "paddle":
        nothing = EngineSupport("openvino", "fp32", "CPU", False, "not installed")
        monkeypatch.setattr("act_pipeline.engines.tensor_runners.find_support", lambda *_: nothing)
    observer = AbsMax()
    with static_mode():
        assert collect(tiny_graph(tmp_path / "m"), {"image": [observer]}, [{"image": images()}]) == 8
    assert observer.abs_max == np.abs(images()).max()


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_a_tensor_that_is_not_finite_is_named_with_its_op(tmp_path: Path, bad: float, word: str) -> None:
    with static_mode():
        model = tiny_graph(tmp_path / "m")
        readers = quantizable_tensors(StaticGraph.load(model), OPS)
        broken = images()
        broken[2, 1, 3, 3] = bad
        with pytest.raises(UserError, match=f"tensor image, read by conv2d .*{word}.* calibration image 3;"):
            collect(model, {name: [AbsMax()] for name in readers}, [{"image": broken}], ops=readers)


def test_weight_thresholds_are_per_channel_and_never_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    weight[2] = 0
    expected = np.abs(weight).reshape(4, -1).max(1)
    expected[2] = 1
    np.testing.assert_array_equal(weight_threshold(weight, 0), expected)
    np.testing.assert_array_equal(weight_threshold(weight[:, :, 0, 0], 1), np.abs(weight[:, :, 0, 0]).max(0))
    np.testing.assert_array_equal(weight_threshold(weight, -1), [np.abs(weight).max()])


def test_bias_correction_takes_out_the_mean_error_of_every_layer(tmp_path: Path) -> None:
    """Only weights are rounded; the remaining mean shift of a layer's output must be nearly 0."""
    with static_mode():
        model = tiny_graph(tmp_path / "m")
        graph = StaticGraph.load(model)
        biases = find_biases(graph, OPS)
        assert [bias.name for bias in biases] == ["b0", "b1", "b2"]
        assert [bias.groups for bias in biases] == [2, 6, 1]
        means = {bias.source: ChannelMean(bias.channel_axis) for bias in biases}
        collect(model, {name: [observer] for name, observer in means.items()}, [{"image": images(64)}])
        block = graph.program.global_block()
        outputs = {
            bias.name: next(op.output_arg_names[0] for op in block.ops if bias.name in op.input_arg_names)
            for bias in biases
        }
        for bias in biases:  # one layer at a time, with the float input
            plain = StaticGraph.load(model)
            before = run(plain, [outputs[bias.name]], images(64))[0]
            weight = plain.parameter(bias.weight)
            axis = 0 if weight.ndim == 4 else 1
            shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
            rounded = int8(weight, weight_threshold(weight, axis).reshape(shape)).astype(np.float32)

            def shift(corrected: bool) -> float:
                graph = StaticGraph.load(model)
                if corrected:
                    correct_biases(graph, [bias], {bias.source: means[bias.source].mean})
                graph.set_parameter(bias.weight, rounded)
                after = run(graph, [outputs[bias.name]], images(64))[0]
                others = (0, 2, 3) if weight.ndim == 4 else (0, 1)
                return float(np.abs((after - before).mean(axis=others, dtype=np.float64)).max())

            assert shift(True) < 0.2 * shift(False), bias.name


@pytest.mark.parametrize("per_channel", [True, False])
def test_what_is_written_computes_what_numpy_says(tmp_path: Path, per_channel: bool) -> None:
    with static_mode():
        model = tiny_graph(tmp_path / "m")
        path = tmp_path / "c.yml"
        path.write_text(
            CONFIG.format(
                reader=READER_CONFIG,
                model=model.directory,
                evaluation="false",
                images=8,
                algo="abs_max",
                bias_correction="true",
            )
        )
        kind = "channel_wise_abs_max" if per_channel else "abs_max"
        config = load_config(path, [f"QuantPost.weight_quantize_type={kind}"])
        (tmp_path / "int8").mkdir()
        made = PostTraining(model, config, lambda: iter([{"image": images()}])).write(tmp_path / "int8")
        assert made.inventory.quantized == {"conv2d": 1, "depthwise_conv2d": 1, "matmul_v2": 2}
        assert made.inventory.kept == [] and made.corrected_biases == 3 and made.images == 8
        float_graph, graph = StaticGraph.load(model), StaticGraph.load(made.model)
        for name, axis in (("w0", 0), ("w1", 0), ("w2", 1)):
            weight = float_graph.parameter(name)
            others = tuple(other for other in range(weight.ndim) if other != axis) if per_channel else None
            scale = np.abs(weight).max(axis=others, keepdims=True)
            stored = graph.parameter(name)
            assert stored.dtype == np.int8
            np.testing.assert_array_equal(stored, np.rint(weight / scale * 127))
            np.testing.assert_allclose(graph.parameter(f"{name}@scale").reshape(-1), scale.reshape(-1))
        assert graph.parameter("image@scale") == pytest.approx(np.abs(images()).max())
        expected = run(float_graph, float_graph.fetch_targets, images())[0]
        found = run(graph, graph.fetch_targets, images())[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_transposed_weight_is_corrected_as_its_own() -> None:
    rng = np.random.default_rng(0)
    weight, mean = rng.standard_normal((5, 7)).astype(np.float32), rng.random(5)
    plain = output_shift(weight, mean, Bias("y", "b", "w", "x", -1))
    turned = output_shift(weight.T.copy(), mean, Bias("y", "b", "w", "x", -1, transposed=True))
    assert plain.shape == (7,) and np.abs(plain).max() > 0
    np.testing.assert_allclose(turned, plain)


# ---- the strategy ----------------------------------------------------------------------------------------------------


def config_of(
    demo,
    folder: Path,
    images: int = 100,
    algo: str = "avg",
    bias_correction: bool = False,
    evaluation: bool = False,
    overrides: tuple[str, ...] = (),
):
    path = folder / "ptq.yml"
    path.write_text(
        CONFIG.format(
            reader=READER_CONFIG,
            model=demo.fp32.directory,
            evaluation=str(evaluation).lower(),
            images=images,
            algo=algo,
            bias_correction=str(bias_correction).lower(),
        )
    )
    return load_config(path, overrides)


@pytest.fixture(scope="module")
def ptq(demo, tmp_path_factory: pytest.TempPathFactory):
    """The sample, quantized with the default settings and evaluated as saved."""
    path = REPOSITORY / "configs" / "sample_ptq.yml"
    config = load_config(path, [f"Global.model_dir={demo.fp32.directory}"])
    save_dir = tmp_path_factory.mktemp("ptq") / "int8"
    with pytest.MonkeyPatch.context() as two_cores:  # fixed, since calibration runs one image per core
        two_cores.setattr("act_pipeline.engines.onnx_runtimes.openvino_tensors.available_cpus", lambda: 2)
        return compress(config, save_dir, progress=False, reader_overrides=demo.places)


def test_the_default_is_within_0_003_and_in_the_record(ptq, demo) -> None:
    record = json.loads((ptq.model.directory / "act.json").read_text())
    assert record["strategy"] == "ptq" and record["fp32"]["map"] == pytest.approx(demo.compressed.record["fp32"]["map"])
    assert record["map_drop"] <= 0.003
    assert record["bytes_ratio"] <= 0.32
    stages = {"prepare", "evaluate_fp32", "calibrate", "quantize", "evaluate_int8", "compare", "latency", "reference"}
    assert set(record["seconds"]) == stages
    calibration = record["calibration"]
    assert calibration["images"] == calibration["images_asked"] == 200 and calibration["seed"] == 0
    assert calibration["algo"] == load_config(REPOSITORY / "configs" / "sample_ptq.yml").quant_post.algo
    assert "training" not in record and record["kept_ops"] == []


def test_the_model_is_of_the_form_that_training_writes(ptq, demo) -> None:
    """All ops, attribute names, and shapes and types of parameters equal those of the trained model."""

    def form(model: InferenceModel):
        with static_mode():
            graph = StaticGraph.load(model)
            block = graph.program.global_block()
            ops = [
                (
                    op.type,
                    op.attr("quant_axis") if op.has_attr("quant_axis") else None,
                    op.has_attr("out_threshold"),
                    tuple(sorted(op.attr_names)),
                )
                for op in block.ops
            ]
            stored = {
                name: (graph.parameter(name).dtype, graph.parameter(name).shape)
                for name, variable in block.vars.items()
                if variable.persistable and name not in ("feed", "fetch")
            }
            return sorted(ops, key=str), stored

    (ops, parameters), (trained_ops, trained_parameters) = form(ptq.model), form(demo.compressed.model)
    assert [op[:3] for op in ops] == [op[:3] for op in trained_ops]
    assert parameters == trained_parameters
    assert ptq.record["quantized_ops"] == demo.compressed.record["quantized_ops"]


def test_the_lowering_takes_it_whole(ptq) -> None:
    pytest.importorskip("onnx")
    from act_pipeline.onnx_export import lowered_onnx

    for target in ("cpu", "tensorrt"):
        record = lowered_onnx(ptq.model, target).record()
        assert record["precision"] == "int8" and record["kept"] == []
        assert sum(record["quantized"].values()) == sum(ptq.record["quantized_ops"].values())


def test_the_same_seed_gives_the_same_model_whatever_the_batches(demo, tmp_path: Path) -> None:
    config = config_of(demo, tmp_path, 9, "avg", bias_correction=True)
    first = compress(config, tmp_path / "a", progress=False, reader_overrides=demo.places)
    other = config_of(demo, tmp_path, 9, "avg", bias_correction=True, overrides=("QuantPost.batch_size=9",))
    second = compress(other, tmp_path / "b", progress=False, reader_overrides=demo.places)
    assert first.record["calibration"]["images"] == second.record["calibration"]["images"] == 9
    with static_mode():
        one, two = StaticGraph.load(first.model), StaticGraph.load(second.model)
        for name, variable in one.program.global_block().vars.items():
            if variable.persistable and name not in ("feed", "fetch"):
                np.testing.assert_allclose(one.parameter(name), two.parameter(name), rtol=2e-3, atol=1e-4, err_msg=name)


def test_images_are_chosen_at_random_by_the_seed(demo) -> None:
    reader = demo.reader()

    def chosen(seed: int) -> list[int]:
        loader = reader.loader("train", batch_size=4, shuffle=False, drop_last=False, seed=seed, images=10)
        return [int(image_id) for batch in loader for image_id in batch["im_id"]]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 10 and chosen(0) != list(range(1, 11))


def test_fewer_images_than_asked_for_are_used_and_said(demo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = [*demo.places, "TrainDataset.sample_num=6"]
    with caplog.at_level("WARNING"):
        made = compress(config_of(demo, tmp_path), tmp_path / "int8", progress=False, reader_overrides=reader)
    assert made.record["calibration"]["images"] == 6 and made.record["calibration"]["images_asked"] == 100
    lines = [line.getMessage() for line in caplog.records if "TrainDataset" in line.getMessage()]
    assert len(lines) == 1 and "has 6 images, 100 are required by the config (QuantPost.calib_images)" in lines[0]


@pytest.mark.parametrize(
    ("overrides", "reader_overrides", "words"),
    [
        (
            ["QuantPost.algo=MSE"],
            [],
            "QuantPost.algo is the text 'MSE', expected one of abs_max, avg, hist, mse, mce, KL",
        ),
        (["QuantPost.algoo=mse"], [], "did you mean 'algo'?"),
        (["QuantPost.hist_percent=1.5"], [], "QuantPost.hist_percent"),
        (["QuantPost.calib_images=0"], [], "QuantPost.calib_images"),
        (["QuantPost.batch_nums=3"], [], "QuantPost.batch_nums is given together with 'calib_images'"),
        (["QuantPost.quantize_op_types=[]"], [], "QuantPost.quantize_op_types is empty"),
        (["QuantPost.quantize_op_types=[conv2d_transpose]"], [], "has no op of QuantPost.quantize_op_types"),
        (
            ["Strategy.name=ptqq"],
            [],
            "Strategy.name is the text 'ptqq', expected one of auto, ptq, smooth_quant, qat_dis",
        ),
        (["Strategy.name=qat_dis"], [], "Distillation is missing"),
        ([], ["TrainDataset.image_dir=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    demo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    reader_overrides: list[str],
    words: str,
) -> None:
    def command(argv):
        config = config_of(demo, tmp_path, overrides=tuple(overrides))
        compress(config, tmp_path / "int8", progress=False, reader_overrides=[*demo.places, *reader_overrides])

    assert run_command(command) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["ptq.yml"]


def test_a_damaged_weight_is_named(demo, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo.fp32.directory, broken)
    with static_mode():
        graph = StaticGraph.load(InferenceModel.load(broken))
        block = graph.program.global_block()
        convolution = [op for op in block.ops if op.type == "conv2d"][3]
        name = convolution.input("Filter")[0]
        graph.set_parameter(name, np.full_like(graph.parameter(name), np.nan))
        graph.save(broken)
    config = config_of(demo, tmp_path, 8, overrides=(f"Global.model_dir={broken}",))
    with pytest.raises(UserError, match=rf"parameter {name} holds NaN"):
        compress(config, tmp_path / "int8", progress=False, reader_overrides=demo.places)
    assert not (tmp_path / "int8").exists()


def test_ptq_configs_load() -> None:
    for path in [*(REPOSITORY / "configs" / "ptq").iterdir(), REPOSITORY / "configs" / "sample_ptq.yml"]:
        config = load_config(path)
        assert config.strategy.name == "ptq" and config.train_config is None
        assert config.quant_post.images == 200
    assert load_config(REPOSITORY / "configs" / "sample.yml").strategy.name == "auto"
    assert load_config(REPOSITORY / "configs" / "sample_qat_dis.yml").strategy.name == "qat_dis"
    config = load_config(REPOSITORY / "configs" / "sample.yml", ["Strategy.name=ptq", "QuantPost.batch_nums=10"])
    assert config.quant_post.images == 10 * config.quant_post.batch_size


@pytest.mark.slow
def test_real_photographs(tmp_path: Path) -> None:
    """Blood cells: the default strategy is within 0.003 mAP of FP32."""
    model, data = SHARED / "models" / "bccd", SHARED / "data" / "bccd"
    if not model.exists():
        pytest.skip("the trained model of real photographs is not beside this repository")
    reader = ["num_classes=3", "EvalReader.sample_transforms.1.Resize.target_size=[256, 256]"]
    for name, split in (("TrainDataset", "train"), ("EvalDataset", "test"), ("TestDataset", "test")):
        reader += [
            f"{name}.dataset_dir={data}",
            f"{name}.image_dir=images",
            f"{name}.anno_path=annotations/instances_{split}.json",
        ]
    config = load_config(REPOSITORY / "configs" / "sample_ptq.yml", [f"Global.model_dir={model}"])
    record = compress(config, tmp_path / "int8", reader_overrides=reader).record
    assert record["fp32"]["map"] == pytest.approx(0.5466, abs=5e-4)
    assert record["map_drop"] <= 0.003 and record["bytes_ratio"] <= 0.32


def test_the_config_names_the_algorithms_that_there_are() -> None:
    assert set(ALGORITHMS) == set(get_args(CalibrationAlgorithm))
