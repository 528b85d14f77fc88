"""Export to Q/DQ ONNX: outputs compared with Paddle's, the Q/DQ format, and rejected models."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from one_op_model import in_executor, small_model

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.paddle.native import PaddleEngine
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SHARED = Path(__file__).resolve().parents[2] / "shared"
BCCD, STOCK, DATA = SHARED / "models/bccd", SHARED / "models/bccd_int8_stock", SHARED / "data/bccd"
# Ops that may be between a Q/DQ and the op that computes in INT8.
MOVERS = ("Concat", "MaxPool", "Reshape", "Resize", "Transpose")
needs_bccd = pytest.mark.skipif(
    not (BCCD.is_dir() and STOCK.is_dir() and DATA.is_dir()),
    reason="the blood cell models and photographs are not at hand",
)


def photographs(count: int) -> dict[str, np.ndarray]:
    """Return inputs made of the first photographs, preprocessed as in infer_cfg.yml: 256 x 256, RGB, 0 to 1."""
    files = sorted((DATA / "images").rglob("*.jp*g"))[:count]
    images, factors = [], []
    for file in files:
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        factors.append([256 / image.shape[0], 256 / image.shape[1]])
        images.append(cv2.resize(image, (256, 256), interpolation=cv2.INTER_CUBIC).transpose(2, 0, 1) / 255)
    return {
        "image": np.array(images, np.float32),
        "im_shape": np.full((count, 2), 256, np.float32),
        "scale_factor": np.array(factors, np.float32),
    }


def one_by_one(run, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the detections of each image, [K, 6] each."""
    return [run({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(len(inputs["image"]))]


def in_onnxruntime(path: Path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["bbox"], inputs)[0]


def in_openvino(path: Path):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda inputs: compiled(inputs)["bbox"]


def in_paddle(model: InferenceModel):
    engine = PaddleEngine(model, "int8", threads=1)
    return lambda inputs: engine.run(inputs)["bbox"]


def agreement(
    expected: list[np.ndarray], found: list[np.ndarray], threshold: float = 0.3
) -> tuple[float, float, float]:
    """Return the mean IoU, the largest and the mean score difference of detections above the threshold.

    Each expected detection is matched to the one of its class with the largest IoU.
    """
    overlaps, differences = [], []
    for wanted, got in zip(expected, found):
        for row in wanted[wanted[:, 1] > threshold]:
            same = got[got[:, 0] == row[0]]
            low, high = np.maximum(same[:, 2:4], row[2:4]), np.minimum(same[:, 4:6], row[4:6])
            common = np.clip(high - low, 0, None).prod(1)
            union = (same[:, 4:6] - same[:, 2:4]).prod(1) + (row[4:6] - row[2:4]).prod() - common
            best = np.argmax(common / union)
            overlaps.append((common / union)[best])
            differences.append(abs(same[best, 1] - row[1]))
    assert overlaps, "nothing was detected"
    return float(np.mean(overlaps)), float(np.max(differences)), float(np.mean(differences))


@pytest.mark.parametrize("target", ["cpu", "tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("conv2d", ""),
        ("depthwise_conv2d", ""),
        ("matmul_v2", ""),
        ("conv2d", "batch_norm"),
        ("depthwise_conv2d", "batch_norm"),
        ("conv2d_transpose", ""),
        ("conv2d_transpose", "bias"),
        ("conv2d_transpose", "batch_norm"),
        ("grouped_transpose", ""),
        ("grouped_transpose", "bias"),
        ("grouped_transpose", "batch_norm"),
        ("depthwise_conv2d_transpose", "batch_norm"),
    ],
)
def test_one_op_computes_what_paddle_computes(tmp_path: Path, kind: str, after: str, target: str) -> None:
    model = small_model(tmp_path / "model", kind, after)
    lowered = lower(model, tmp_path / "model.onnx", target, precision="int8")
    assert lowered.quantized == {kind.replace("grouped", "conv2d"): 1} and lowered.kept == []
    image = np.random.default_rng(5).normal(scale=1.5, size=(2, 4, 6, 6)).astype(np.float32)  # some exceed the scale
    assert np.abs(image).max() > 2.5
    session = ort.InferenceSession(str(lowered.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": image})
    expected = in_executor(model, image)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if target == "cpu" and "transpose" in kind:
        openvino = pytest.importorskip("openvino")
        compiled = openvino.Core().compile_model(str(lowered.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        np.testing.assert_allclose(compiled(image)[0], expected, rtol=1e-5, atol=1e-5)
    if target == "tensorrt_rtx":
        graph = onnx.load(lowered.path).graph
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        assert {float(constants[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"} == {1.0}


def spelling(path: Path) -> tuple[set[int], set[str], set[str]]:
    """Return the zero points of QuantizeLinear, the types of all rounded constants, and the readers of Q/DQ results."""
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zero_points = {(constants[n.input[2]].dtype.name, int(constants[n.input[2]])) for n in graph.node
                   if n.op_type == "QuantizeLinear"}  # fmt: skip
    made = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    weights = {constants[n.input[0]].dtype.name for n in graph.node
               if n.op_type == "DequantizeLinear" and n.input[0] in constants}  # fmt: skip
    return zero_points, weights, {n.op_type for n in graph.node if made & set(n.input)}


def without_observers(model: InferenceModel, directory: Path) -> InferenceModel:
    """Save the model that stock ACT evaluated: without the Q/DQ pairs marked as observers."""
    directory.mkdir()
    with static_mode():
        graph = StaticGraph.load(model)
        block = graph.program.global_block()
        sources, acting, removed = {}, set(), []
        for op in block.ops:
            observer = op.type in ("quantize_linear", "dequantize_linear") and (
                op.has_attr("only_observer") and op.attr("only_observer")
            )
            if observer:
                source = op.input("X")[0]
                sources[op.output("Y")[0]] = sources.get(source, source)
                removed.append(op)
            elif op.type == "dequantize_linear":
                acting.add(op.output("Y")[0])
            else:
                for name in op.input_arg_names:
                    keep = op.type in ("conv2d", "depthwise_conv2d", "matmul_v2") and name in acting
                    if name in sources and not keep:
                        op._rename_input(name, sources[name])
        for op in reversed(removed):
            block._remove_op(block.ops.index(op))
        return graph.save(directory)


@needs_bccd
def test_stock_act_agrees_with_paddle(tmp_path: Path) -> None:
    """Scores are compared by their mean, since rounding is chaotic.

    In Paddle itself single scores move by 0.05 (mean 0.007, IoU 0.992) when one bias of a convolution changes by 3e-6.
    """
    inputs = photographs(3)
    stock = InferenceModel.load(STOCK)
    expected = one_by_one(in_paddle(without_observers(stock, tmp_path / "paddle")), inputs)
    float_bytes = lower(InferenceModel.load(BCCD), tmp_path / "float.onnx").bytes
    for target, runtimes in (("cpu", (in_onnxruntime, in_openvino)), ("tensorrt", (in_onnxruntime,))):
        lowered = lower(stock, tmp_path / f"{target}.onnx", target)
        assert lowered.quantized == {"conv2d": 56, "depthwise_conv2d": 12, "matmul_v2": 65} and lowered.kept == []
        assert lowered.bytes <= 0.30 * float_bytes
        zero_point = ("uint8", 128) if target == "cpu" else ("int8", 0)
        zero_points, weights, readers = spelling(lowered.path)
        assert (zero_points, weights) == ({zero_point}, {"int8"})
        assert {"Conv", "MatMul"} <= readers <= {"Conv", "MatMul", *(MOVERS if target == "cpu" else ())}
        for runtime in runtimes:
            overlap, largest, mean = agreement(expected, one_by_one(runtime(lowered.path), inputs))
            print(f"{target} {runtime.__name__}: IoU {overlap:.4f}, scores within {largest:.4f}, mean {mean:.4f}")
            assert overlap >= 0.98 and mean <= 0.03, (target, runtime.__name__, overlap, largest)
    run = in_onnxruntime(tmp_path / "cpu.onnx")
    overlap, _, mean = agreement(one_by_one(run, inputs), list(run(inputs).reshape(3, -1, 6)))
    assert overlap >= 0.98 and mean <= 0.03, "a batch of three"


@needs_bccd
def test_a_float_model_agrees_and_takes_any_batch(tmp_path: Path) -> None:
    inputs = photographs(3)
    model = InferenceModel.load(BCCD)
    expected = one_by_one(in_paddle(model), inputs)
    lowered = lower(model, tmp_path / "float.onnx")
    assert lowered.precision == "fp32" and lowered.quantized == {}
    proto = onnx.load(lowered.path)
    assert proto.opset_import[0].version == 17
    assert [v.name for v in proto.graph.input] == ["image", "im_shape", "scale_factor"] or len(proto.graph.input) == 3
    assert [v.name for v in proto.graph.output] == ["bbox", "bbox_num"]
    for runtime in (in_onnxruntime, in_openvino):
        run = runtime(lowered.path)
        overlap, largest, _ = agreement(expected, one_by_one(run, inputs))
        assert overlap > 0.999 and largest < 1e-3, (runtime.__name__, overlap, largest)
        together = run(inputs).reshape(3, -1, 6)
        overlap, largest, _ = agreement(expected, list(together))
        assert overlap > 0.999 and largest < 1e-3, (runtime.__name__, overlap, largest)


@needs_bccd
def test_a_fixed_batch_and_opset(tmp_path: Path) -> None:
    lowered = lower(InferenceModel.load(BCCD), tmp_path / "b.onnx", opset=20, batch=2)
    graph = onnx.load(lowered.path).graph
    assert {v.type.tensor_type.shape.dim[0].dim_value for v in graph.input} == {2}
    found = in_onnxruntime(lowered.path)(photographs(2))
    assert found.shape[1] == 6 and len(found) % 2 == 0


def test_bad_arguments(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", "matmul_v2")
    with pytest.raises(UserError, match="target is 'tensorrtt'.*did you mean 'tensorrt'"):
        lower(model, tmp_path / "x.onnx", "tensorrtt")
    with pytest.raises(UserError, match="opset is 13, expected 17 to 21"):
        lower(model, tmp_path / "x.onnx", opset=13)
    with pytest.raises(UserError, match="is an INT8 model"):
        lower(model, tmp_path / "x.onnx", precision="fp32")
    assert not (tmp_path / "x.onnx").exists()


def float_model(directory: Path, act) -> InferenceModel:
    import paddle

    directory.mkdir()
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
            image = paddle.static.data("image", [-1, 4], "float32")
            executor = paddle.static.Executor(paddle.CPUPlace())
            graph = StaticGraph(program, ["image"], [], scope, executor)
            one = graph.add_parameter("one", np.ones(1, np.float32))  # Paddle writes no file without parameters
            graph.fetch_targets.append(act(image + one))
            return graph.save(directory)


def test_a_model_without_scales_and_an_unknown_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import paddle

    from act_pipeline.cli.onnx import main
    from act_pipeline.core.errors import run_command

    float_model(tmp_path / "relu", paddle.nn.functional.relu)
    float_model(tmp_path / "sinh", paddle.sinh)
    output = ["--output", str(tmp_path / "x.onnx")]
    for arguments, words in (
        (["--model_path", str(tmp_path / "relu"), "--precision", "int8"], "has no quantize_linear ops, so no scales"),
        (["--model_path", str(tmp_path / "sinh")], "op sinh with the output"),
        (
            ["--model_path", str(tmp_path / "relu"), "--target", "gpu"],
            "target is 'gpu', expected one of tensorrt, tensorrt_rtx, cpu",
        ),
        (
            ["--model_path", str(tmp_path / "relu"), "--target", "onnxruntime", "--float16"],
            "target onnxruntime is for CPUs and float16 for GPUs",
        ),
        (["--model_path", str(tmp_path / "relu"), "--batch", "0"], "--batch is '0'"),
    ):
        assert run_command(main, arguments + output) == 2
        said = capsys.readouterr().err
        error = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(error) == 1 and words in error[0], said
    assert not (tmp_path / "x.onnx").exists()
    assert run_command(main, ["--model_path", str(tmp_path / "relu"), *output]) == 0
    said = capsys.readouterr().out
    assert "opset 17, any batch size, FP32" in said and {path.name for path in tmp_path.glob("x.*")} == {
        "x.onnx",
        "x.json",
    }
    assert str(tmp_path / "x.json") in said.splitlines()[-1]


@needs_bccd
def test_onnxruntime_computes_every_quantized_convolution_in_int8(tmp_path: Path) -> None:
    """Of ``--target cpu`` it computes none in INT8; the further rounding of their outputs costs little."""
    inputs = photographs(3)
    stock = InferenceModel.load(STOCK)
    plain, fast = (lower(stock, tmp_path / f"{target}.onnx", target).path for target in ("cpu", "onnxruntime"))
    for path, count in ((plain, 0), (fast, 68)):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
        kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        assert kinds.count("QLinearConv") == count
    overlap, _, mean = agreement(
        one_by_one(in_onnxruntime(plain), inputs), one_by_one(in_onnxruntime(fast), inputs)
    )  # fmt: skip
    assert overlap >= 0.97 and mean <= 0.04
