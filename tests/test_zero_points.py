"""Zero points of activations in ONNX files for the CPU: their choice, and that the runtimes compute what NumPy says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.calibration import AbsHistogram
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.compress.accuracy_control.revert import read_thresholds, rescaled
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.qat.zero_points import lowest_with_zero_points, round_finely
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.demo import READER_CONFIG
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.int8_rounding import unsigned_range
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export.float_ops.registry import add_op
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op, QuantizedTensor, Source
from act_pipeline.onnx_export.quantized_ops import convolution, matmul
from act_pipeline.onnx_export.rewrites.qdq_placement import round_early
from act_pipeline.onnx_export.rewrites.zero_points import choose_zero_points

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
CONFIG = """
Global: {{reader_config: {reader}, model_dir: {model}}}
Strategy: {{name: ptq}}
QuantPost: {{calib_images: 8, algo: abs_max, bias_correction: false, zero_points: {zero_points}}}
"""
SIZE = 6
# Kind of layer -> its weight, its padding and groups; None: a matmul.
LAYERS = {
    "padded": ((5, 4, 3, 3), 1, 1),
    "pointwise": ((5, 4, 1, 1), 0, 1),
    "unpadded depthwise": ((4, 1, 3, 3), 0, 4),
    "matmul": ((SIZE, 5), 0, None),
}


def weight_of(layer: str) -> np.ndarray:
    shape = LAYERS[layer][0]
    scales = np.linspace(0.2, 2, shape[0]).reshape([-1] + [1] * (len(shape) - 1))
    return (np.random.default_rng(3).standard_normal(shape) * scales).astype(np.float32)


def make_model(folder: Path, activation: str, layers: list[str]) -> Path:
    """Save an activation (of ``paddle.nn.functional``) of the image [N, 4, 6, 6] that layers without bias read."""
    import paddle

    functional = paddle.nn.functional
    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 4, SIZE, SIZE], "float32")
        # A graph without any parameter is saved without a file for them.
        one = paddle.nn.initializer.Constant(1.0)
        x = image * paddle.create_parameter([1], "float32", attr=paddle.ParamAttr("one", initializer=one))
        x = getattr(functional, activation)(x)
        outputs = []
        for number, layer in enumerate(layers):
            shape, padding, groups = LAYERS[layer]
            start = paddle.nn.initializer.Assign(weight_of(layer))
            weight = paddle.create_parameter(
                list(shape), "float32", attr=paddle.ParamAttr(f"w{number}", initializer=start)
            )
            if groups is None:
                outputs.append(paddle.matmul(x, weight))
            else:
                outputs.append(functional.conv2d(x, weight, padding=padding, groups=groups))
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        folder.mkdir(parents=True, exist_ok=True)
        paddle.static.save_inference_model(str(folder / "model"), [image], outputs, executor, program=main)
    return folder


def images(count: int = 8) -> np.ndarray:
    return (3 * np.random.default_rng(5).standard_normal((count, 4, SIZE, SIZE))).astype(np.float32)


def calibrated(folder: Path, model: Path, zero_points: bool = True, calibration: np.ndarray | None = None):
    path = folder / "c.yml"
    path.write_text(CONFIG.format(reader=READER_CONFIG, model=model, zero_points=str(zero_points).lower()))
    (folder / "int8").mkdir()
    with static_mode():
        post = PostTraining(
            InferenceModel.load(model), load_config(path, []),
            lambda: iter([{"image": images() if calibration is None else calibration}]),
        )  # fmt: skip
        return post.write(folder / "int8").model


def float_values(activation: str, image: np.ndarray) -> np.ndarray:
    """Return the activation by its definition."""
    x = image.astype(np.float64)
    if activation == "gelu":
        erf = np.vectorize(math.erf)
        return x * (1 + erf(x / np.sqrt(2))) / 2
    sigmoid = 1 / (1 + np.exp(-x))
    return {"relu": np.maximum(x, 0), "silu": x * sigmoid, "sigmoid": sigmoid, "tanh": np.tanh(x)}[activation]


def rounded(values: np.ndarray, least: float, largest: float) -> np.ndarray:
    """Return values in 8 bits: from their least to their largest value, 0 exact; symmetrically if both sides count."""
    if -least > largest / 2:
        step = largest / 127
        return np.clip(np.rint(values / step), -128, 127) * step
    step = (largest - min(least, 0)) / 255
    zero = np.rint(-min(least, 0) / step)
    return (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step


def layer_output(layer: str, x: np.ndarray) -> np.ndarray:
    """Return the output of a layer with its weight rounded to INT8, by output channel."""
    weight = weight_of(layer).astype(np.float64)
    _, padding, groups = LAYERS[layer]
    axes = (0,) if groups is None else (1, 2, 3)
    step = np.abs(weight).max(axis=axes, keepdims=True) / 127
    weight = np.rint(weight / step) * step
    if groups is None:
        return x @ weight
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[2]
    height, width = (edge - size + 1 for edge in x.shape[2:])
    found = np.zeros((len(x), len(weight), height, width))
    for row in range(size):
        for column in range(size):
            part = x[:, :, row : row + height, column : column + width]
            if groups == 1:
                found += np.einsum("nchw,oc->nohw", part, weight[:, :, row, column])
            else:
                found += part * weight[None, :, 0, row, column, None, None]
    return found


def export(model: InferenceModel, path: Path, target: str = "cpu"):
    from act_pipeline.onnx_export import lower

    return lower(model, path, target)


def zero_points(path: Path) -> set[tuple[int, int]]:
    """Return the zero points of QuantizeLinear and of the DequantizeLinear that reads it."""
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    before = {n.output[0]: int(constants[n.input[2]]) for n in graph.node if n.op_type == "QuantizeLinear"}
    return {
        (before[n.input[0]], int(constants[n.input[2]]))
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in before
    }


def in_onnxruntime(path: Path, image: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})


def in_openvino(path: Path, image: np.ndarray) -> list[np.ndarray]:
    openvino = pytest.importorskip("openvino")
    from act_pipeline.engines.onnx_runtimes.openvino_quantization import replace_qdq_with_fake_quantize

    core = openvino.Core()
    model = core.read_model(str(path))
    assert replace_qdq_with_fake_quantize(model) == 1
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(image)
    return [found[index] for index in range(len(compiled.outputs))]


def write_file(path: Path, layers: list[str], largest: float, least: float, moved: bool) -> Path:
    """Write the ONNX file of layers that read the input ``image`` rounded, enlarged if ``moved``."""
    source = Source(inputs=["image"])
    source.shapes["image"], read = (-1, 4, SIZE, SIZE), "image"
    if moved:
        attrs = {"scale": [2.0, 2.0], "out_h": -1, "out_w": -1, "align_corners": False, "interp_method": "nearest"}
        source.ops.append(Op("nearest_interp_v2", {"X": [read]}, {"Out": ["large"]}, {**attrs, "data_layout": "NCHW"}))
        source.shapes["large"], read = (-1, 4, 2 * SIZE, 2 * SIZE), "large"
    source.quantized["x"] = QuantizedTensor(read, np.float32(largest / 127).reshape(()), lowest=least)
    source.shapes["x"] = source.shapes[read]
    for layer in layers:
        value = weight_of(layer)
        _, padding, groups = LAYERS[layer]
        step = np.abs(value).max(axis=(0,) if groups is None else (1, 2, 3)) / np.float32(127)
        integers = np.rint(value / (step if groups is None else step.reshape(-1, 1, 1, 1))).astype(np.int8)
        source.constants[f"{layer}.int8"] = integers
        source.quantized[f"{layer}.w"] = QuantizedTensor(f"{layer}.int8", step, 1 if groups is None else 0, integers)
        source.shapes[f"{layer}.w"] = source.shapes[f"{layer}.int8"] = value.shape
        if groups is None:
            source.ops.append(Op("matmul_v2", {"X": ["x"], "Y": [f"{layer}.w"]}, {"Out": [layer]}, {}))
        else:
            attrs = {"groups": groups, "strides": [1, 1], "paddings": [padding] * 2, "dilations": [1, 1]}
            kind = "conv2d" if groups == 1 else "depthwise_conv2d"
            inputs = {"Input": ["x"], "Filter": [f"{layer}.w"]}
            source.ops.append(Op(kind, inputs, {"Output": [layer]}, {**attrs, "padding_algorithm": "EXPLICIT"}))
        source.shapes[layer] = (-1,) * 4
        source.outputs.append(layer)
    source.dtypes = dict.fromkeys(source.shapes, np.float32)
    choose_zero_points(source)
    round_early(source)
    build = GraphBuilder(source, "uint8", 17)
    for op in source.ops:
        {"matmul_v2": lambda op: matmul(build, op), "nearest_interp_v2": lambda op: add_op(build, op)}.get(
            op.type, lambda op: convolution(build, op, [])
        )(op)
    values = [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [None, *source.shapes["image"][1:]])]
    outputs = [onnx.helper.make_tensor_value_info(build.values[name], onnx.TensorProto.FLOAT, None) for name in layers]
    graph = onnx.helper.make_graph(build.nodes, "layers", values, outputs, list(build.initializers.values()))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# ---- the range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "lowest", "expected"),
    [
        (5.1, 0.0, (0.02, 0)),  # ReLU
        (5.1, None, (5.1 / 127, 128)),  # unknown
        (5.1, 0.3, (0.02, 0)),  # never 0, which has to be exact all the same
        (5.1, -2.56, (5.1 / 127, 128)),  # both sides count
        (4.9, -0.2, (0.02, 10)),  # SiLU
        (0.9, -0.11, (1.01 / 255, 28)),
    ],
)
def test_the_range_of_an_unsigned_tensor(largest: float, lowest: float | None, expected: tuple[float, int]) -> None:
    step, zero = unsigned_range(largest, lowest)
    assert (step, zero) == (pytest.approx(expected[0], rel=1e-9), expected[1])


@pytest.mark.parametrize(("algo", "power"), [("mse", 2), ("mce", 3)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_threshold_has_the_least_error_of_the_range_that_is_used(algo: str, power: int, activation: str) -> None:
    tails = np.random.default_rng(5).laplace(size=(1500, 4, SIZE, SIZE))
    values = float_values(activation, tails).astype(np.float32)
    observer = AbsHistogram()
    observer.update(values, 1500)
    assert observer.lowest == min(values.min(), 0)
    found = threshold(observer, algo, zero_points=True)

    def error(limit: float) -> float:
        return float((np.abs(rounded(values, observer.lowest, limit) - values) ** power).sum(dtype=np.float64))

    least = min(error(np.abs(values).max() * share) for share in np.exp2(-np.arange(0, 2, 0.04)))
    assert error(found) <= 1.02 * least


# ---- the files -------------------------------------------------------------------------------------------------------

CASES = [
    ("relu", ["padded"], {(0, 0)}),
    ("sigmoid", ["padded", "pointwise"], {(0, 0)}),
    ("silu", ["pointwise"], {"shifted"}),
    ("silu", ["unpadded depthwise", "pointwise"], {"shifted"}),
    ("silu", ["padded"], {(128, 128)}),
    ("silu", ["padded", "pointwise"], {(128, 128)}),
    ("gelu", ["matmul"], {"kept"}),
    ("gelu", ["matmul", "pointwise"], {(128, 128)}),
    ("tanh", ["padded", "matmul"], {(128, 128)}),
]


@pytest.mark.parametrize(
    ("activation", "layers", "expected", "moved"),
    # Enlarged, the activation does not fit the matmul's weight.
    [(*case, moved) for case in CASES for moved in (False, True) if not (moved and "matmul" in case[1])],
)
def test_the_runtimes_compute_the_range_that_numpy_rounds_to(
    tmp_path: Path, activation: str, layers: list[str], expected: set[object], moved: bool
) -> None:
    values = float_values(activation, images())
    least, largest = float(values.min()), float(np.abs(values).max())
    path = write_file(tmp_path / "cpu.onnx", layers, largest, least, moved)
    zero = unsigned_range(largest, least)[1]
    pairs = {{"shifted": (zero, 0), "kept": (zero, zero)}.get(kind, kind) for kind in expected}
    assert zero_points(path) == pairs and (zero not in (0, 128)) == (activation in ("silu", "gelu"))
    given = float_values(activation, 1.3 * images(3)).astype(np.float32)  # beyond the range too, which is clipped
    x = rounded(given, least if zero in {pair[0] for pair in pairs} else -largest, largest)
    x = x.repeat(2, axis=2).repeat(2, axis=3) if moved else x
    for run in (in_onnxruntime, in_openvino):
        for layer, output in zip(layers, run(path, given)):
            # A value in the middle between two steps may be rounded to either.
            assert np.mean(np.abs(output - layer_output(layer, x)) > 1e-4 * np.abs(output).max()) < 0.02, run.__name__


def test_tensorrt_and_files_without_zero_points_stay_symmetric(tmp_path: Path) -> None:
    with static_mode():
        model = make_model(tmp_path / "m", "silu", ["pointwise"])
    int8 = calibrated(tmp_path, model)
    export(int8, tmp_path / "trt.onnx", "tensorrt")
    assert zero_points(tmp_path / "trt.onnx") == {(0, 0)}
    (tmp_path / "plain").mkdir()
    export(calibrated(tmp_path / "plain", model, zero_points=False), tmp_path / "plain.onnx")
    assert zero_points(tmp_path / "plain.onnx") == {(128, 128)}


def test_other_thresholds_keep_the_least_values(tmp_path: Path) -> None:
    with static_mode():
        model = make_model(tmp_path / "m", "silu", ["pointwise"])
        int8 = calibrated(tmp_path, model)
        (name,) = read_thresholds(int8)
        (tmp_path / "other").mkdir()
        other = rescaled(int8, {name: 2.0}, tmp_path / "other")
    export(other, tmp_path / "cpu.onnx")
    least = float(float_values("silu", images()).min())
    assert zero_points(tmp_path / "cpu.onnx") == {(unsigned_range(2.0, least)[1], 0)}


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_channel_of_a_thousand_times_the_others(tmp_path: Path, activation: str) -> None:
    """Eight images calibrate; all other channels fall below the first step, so that little can be gained."""
    scales = np.array([1000, 1, 1, 1], np.float32).reshape(1, 4, 1, 1)
    calibration = np.abs(images()) * scales
    image = np.abs(images(64)) * scales
    with static_mode():
        model = make_model(tmp_path / "m", activation, ["pointwise"])
        graph = StaticGraph.load(InferenceModel.load(model))
        (expected,) = graph.executor.run(
            graph.program, feed={"image": image}, fetch_list=graph.fetch_targets, scope=graph.scope
        )
    errors = []
    for zero_points_used in (False, True):
        (tmp_path / str(zero_points_used)).mkdir()
        int8 = calibrated(tmp_path / str(zero_points_used), model, zero_points_used, calibration)
        export(int8, tmp_path / f"{zero_points_used}.onnx")
        (found,) = in_onnxruntime(tmp_path / f"{zero_points_used}.onnx", image)
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("activation", "layer", "lowest"),
    [
        ("relu", "padded", 0.0),
        ("silu", "pointwise", -0.278),
        ("silu", "matmul", -0.278),
        ("silu", "padded", None),  # stays symmetric in the files
        ("tanh", "matmul", None),
    ],
)
def test_training_rounds_what_the_files_round_with_zero_points(
    tmp_path: Path, activation: str, layer: str, lowest: float | None
) -> None:
    """Its steps are the 255th part of the threshold, in Paddle's kernels and in the faster ones."""
    (tmp_path / "symmetric").mkdir()
    with static_mode():
        source = make_model(tmp_path / "float", activation, [layer])
        model, symmetric = calibrated(tmp_path, source), calibrated(tmp_path / "symmetric", source, zero_points=False)
        ((name, threshold),) = read_thresholds(model).items()
        found = lowest_with_zero_points(model)
        assert lowest_with_zero_points(symmetric) == {}
    assert found == ({} if lowest is None else {name: pytest.approx(lowest, abs=1e-3)})
    step = threshold / (127 if lowest is None else 255)
    for quick in (False, True):
        values, rounded_values = in_training(model, name, found, quick)
        expected = np.clip(np.rint(values / step) * step, None, threshold)
        np.testing.assert_allclose(rounded_values, expected, rtol=1e-5, atol=1e-6)


def in_training(model: InferenceModel, name: str, activations: dict[str, float], quick: bool) -> list[np.ndarray]:
    """Return an activation, and what its readers get in a training with these zero points."""
    import paddle

    with static_mode():
        graph = StaticGraph.load(model)
        block = graph.program.global_block()
        assert round_finely(graph.program, activations) == len(activations)
        (quantize,) = (op for op in block.ops if op.type == "quantize_linear" and op.input("X") == [name])
        (dequantize,) = (
            op for op in block.ops if op.type == "dequantize_linear" and op.input("X") == quantize.output("Y")
        )
        fetched = [name, dequantize.output("Y")[0]]
        if quick:
            assert round_in_vectors(graph.program) == 1
        with paddle.static.scope_guard(graph.scope):
            found = graph.executor.run(graph.program, feed={"image": images(2)}, fetch_list=fetched)
        graph.close()
    return found
