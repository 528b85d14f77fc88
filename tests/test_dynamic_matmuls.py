"""``quantize.dynamic``: MatMuls whose activations are rounded by their own range when the model runs."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.op_selection import Selection, check_dynamic, select
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.config import Config, Quantize, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_SCHEMA, write_record
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

CONFIG = Path(__file__).parents[1] / "configs" / "sample_ptq.yml"
TYPES = ("conv2d", "matmul_v2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """A convolution, products with a square weight, with a wide one and with one that is transposed, and of two results.

    The scales of the weights' columns differ by a factor of 10.
    """
    import paddle
    import paddle.nn.functional as F

    rng = np.random.default_rng(0)

    def constant(name: str, shape: list[int]) -> object:
        values = (rng.normal(size=shape) * np.linspace(0.1, 1, shape[-1])).astype(np.float32)
        start = paddle.nn.initializer.Assign(values)
        return paddle.static.create_parameter(shape, "float32", attr=paddle.ParamAttr(name=name, initializer=start))

    folder = tmp_path_factory.mktemp("float")
    with static_mode(), paddle.utils.unique_name.guard():
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            image = paddle.static.data("image", [-1, 5, 16], "float32")
            square = F.relu(paddle.matmul(image, constant("square", [16, 16])))
            wide = paddle.matmul(square, constant("wide", [16, 24]))
            turned = paddle.matmul(wide, constant("turned", [8, 24]), transpose_y=True)
            pixels = F.conv2d(paddle.reshape(turned, [-1, 5, 2, 4]), constant("filter", [5, 5, 1, 1]))
            both = paddle.matmul(paddle.reshape(pixels, [-1, 5, 8]), turned, transpose_y=True)
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            paddle.static.save_inference_model(str(folder / "model"), [image], [wide, both], executor)
    return InferenceModel.load(folder)


def selected(model: InferenceModel, quantize: Quantize) -> tuple[Selection, dict[str, str]]:
    """Return the selection, checked, and the name of the op of each weight."""
    with static_mode():
        graph = StaticGraph.load(model)
        ops = quantizable_ops(graph, TYPES)
        try:
            selection = select(ops, quantize, Path("c.yml"))
            check_dynamic(graph, selection, Path("c.yml"))
        finally:
            graph.close()
    return selection, {op.weight: op.name for op in ops if op.weight is not None}


def inputs(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(count)
    return [{"image": rng.normal(0.3, 1, (2, 5, 16)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def dynamic(
    model: InferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[InferenceModel, Selection, Config]:
    """The INT8 model by calibration, with the products with ``square`` and ``wide`` dynamic and the rest in INT8."""
    names = selected(model, Quantize())[1]
    selection, _ = selected(model, Quantize(dynamic=[names["square"], names["wide"]]))
    config = load_config(CONFIG, [f"Global.model_dir={model.directory}", "QuantPost.calib_images=4"])
    with static_mode():
        made = PostTraining(model, config, lambda: iter(inputs(4)), "CPU", selection).write(
            tmp_path_factory.mktemp("int8"), "abs_max"
        )
    assert made.inventory.quantized == {"matmul_v2": 2, "conv2d": 1} and made.inventory.kept == []
    assert [(op["output"], op["reason"]) for op in made.inventory.weight_only] == [
        (names["square"], "quantize.dynamic"),
        (names["wide"], "quantize.dynamic"),
    ]
    return made.model, selection, config


def op_counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def in_float(model: InferenceModel, image: np.ndarray) -> np.ndarray:
    with static_mode():
        graph = StaticGraph.load(model)
        square, wide = (graph.parameter(name).astype(np.float64) for name in ("square", "wide"))
        graph.close()
    return np.maximum(image @ square, 0) @ wide


def by_hand(model: InferenceModel, image: np.ndarray) -> np.ndarray:
    """Return the product with ``wide``, with activations in uint8 by the range of each tensor and weights in int8."""
    with static_mode():
        graph = StaticGraph.load(model)
        weights = [graph.parameter(name) for name in ("square", "wide")]
        graph.close()
    value = image
    for weight in weights:
        value = np.maximum(value, 0) if value is not image else value
        steps = np.abs(weight).max(axis=0) / np.float32(127)
        low, high = min(value.min(), np.float32(0)), max(value.max(), np.float32(0))
        step = np.float32((high - low) / np.float32(255))
        zero = np.rint(-low / step)
        integers = np.clip(np.rint(value / step) + zero, 0, 255).astype(np.int32) - int(zero)
        value = (integers @ np.rint(weight / steps).astype(np.int32)).astype(np.float32) * (step * steps)
    return value


def test_the_file_holds_integer_products_that_runtimes_compute(model, dynamic, tmp_path: Path) -> None:
    lowered = lower(dynamic[0], tmp_path / "cpu.onnx", "cpu")
    counts = op_counts(lowered.path)
    assert counts["DynamicQuantizeLinear"] == counts["MatMulInteger"] == 2 and counts["MatMul"] == 2
    assert lowered.quantized == {"matmul_v2": 4, "conv2d": 1} and lowered.kept == []
    openvino = pytest.importorskip("openvino")
    session = ort.InferenceSession(str(lowered.path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(lowered.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (1, 100):  # a hundred times what the calibration has seen
        image = inputs(7)[-1]["image"] * np.float32(size)
        expected, exact = by_hand(model, image), in_float(model, image)
        found = session.run(None, {"image": image})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * size)
        np.testing.assert_allclose(compiled(image)[0], expected, rtol=1e-5, atol=1e-5 * size)
        assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(("target", "float16"), [("tensorrt", False), ("tensorrt_rtx", False), ("cpu", True)])
def test_gpus_get_int8_weights_and_float_activations(dynamic, target: str, float16: bool, tmp_path: Path) -> None:
    lowered = lower(dynamic[0], tmp_path / "gpu.onnx", target, float16=float16)
    counts = op_counts(lowered.path)
    assert "DynamicQuantizeLinear" not in counts and counts["MatMul"] == 4
    assert lowered.quantized == {"matmul_v2": 2, "conv2d": 1} and len(lowered.kept) == 2


def test_the_export_says_why_an_op_is_in_float(dynamic, tmp_path: Path) -> None:
    """As act.json does, and by the module's name; a model of PaddleSlim's own ACT has no record."""
    model = InferenceModel.load(shutil.copytree(dynamic[0].directory, tmp_path / "int8"))
    lowered = lower(model, tmp_path / "a.onnx", "tensorrt")
    first, second = (op["output"] for op in lowered.kept)
    said = lowered.summary().splitlines()
    assert said[0].endswith("any batch size, INT8 for TensorRT") and said[1].startswith(
        "in INT8: 1 conv2d, 2 matmul_v2"
    )
    assert said[2] == "in FP32: 2 convolutions and matmuls:"
    assert said[3].startswith(f"  {first} (matmul_v2): the INT8 model has no scale for its input ")
    record = model.directory / "act.json"
    ops = [{"output": first, "module": "head.dfl", "reason": "it hurts"}, {"reason": "of nothing"}, 7]
    write_record(record, ACT_SCHEMA, {"kept_ops": ops, "weight_only_ops": [{"output": second, "reason": 1}]})
    lowered = lower(model, tmp_path / "b.onnx", "tensorrt")
    assert lowered.summary().splitlines()[3:] == ["  head.dfl (matmul_v2): it hurts", said[4]]
    assert lowered.kept[0] == {"type": "matmul_v2", "output": first, "module": "head.dfl", "reason": "it hurts"}
    record.write_text("[")
    assert lower(model, tmp_path / "c.onnx", "tensorrt").summary().splitlines()[1:] == said[1:]


def test_an_op_reverted_to_float_is_no_longer_dynamic(model, dynamic, tmp_path: Path) -> None:
    int8, selection, config = dynamic
    names = selection.dynamic[:1]
    left = selection.revert_to_float(names, "too hard")
    assert left.dynamic == left.weight_only == selection.dynamic[1:]
    for source in (None, model):
        folder = tmp_path / str(source is None)
        folder.mkdir()
        with static_mode():
            back = revert_to_float(int8, names, folder, source)
            inventory = inventory_of(back, config.op_types, config.op_section)
        reasons = Counter(op["reason"] for op in inventory.weight_only)
        assert reasons["quantize.dynamic"] == 1 and reasons["quantize.weight_only"] == (source is None)
        assert op_counts(lower(back, folder / "back.onnx").path)["MatMulInteger"] == 1


def test_patterns_choose_dynamic_products(model: InferenceModel) -> None:
    selection, names = selected(model, Quantize())
    product = next(op.name for op in selection.ops if op.weight is None)
    quantize = Quantize(exclude=[names["turned"]], dynamic=["matmul_v2"])
    found, _ = selected(model, quantize)
    assert found.dynamic == found.weight_only == (names["square"], names["wide"])
    assert found.int8 == [names["filter"]]
    assert found.kept[product] == "quantize.dynamic: matmul_v2, and it has no weight"
    both, _ = selected(model, Quantize(weight_only=["conv2d"], dynamic=[names["wide"]]))
    assert both.weight_only == (names["wide"], names["filter"]) and both.dynamic == (names["wide"],)


@pytest.mark.parametrize(
    ("dynamic", "weight_only", "words"),
    [
        (
            ["conv2d"],
            [],
            r"^c.yml: quantize.dynamic: conv2d_0.tmp_0 .* is a conv2d, expected a matmul_v2 .*weight_only$",
        ),
        (["matmul_v2"], [], "^c.yml: quantize.dynamic: matmul_v2_2.tmp_0 .* transposes its weight, expected"),
        (["matmul"], [], "^c.yml: quantize.dynamic: 'matmul' matches none of the 5 ops.*did you mean 'matmul_v2'"),
        (["matmul_v2_1.tmp_0"], ["matmul_v2"], "'matmul_v2_1.tmp_0' and quantize.weight_only: 'matmul_v2' both match"),
    ],
)
def test_other_ops_are_refused_in_one_line(model, dynamic: list[str], weight_only: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        selected(model, Quantize(dynamic=dynamic, weight_only=weight_only))
    assert "\n" not in str(raised.value)
