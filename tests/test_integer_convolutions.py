"""The ``onnxruntime`` target: every quantized convolution becomes a QLinearConv, and computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (switches off telemetry)
from act_pipeline.onnx_export.rewrites.integer_convolutions import _silu_inverse, write_integer_convolutions

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

CHANNELS, SIZE = 8, 6
WITHOUT = ["WeightBiasQuantization"]


class Net:
    """An ONNX graph of convolutions whose operands are quantized, made step by step."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attrs: Any) -> str:
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attrs))
        return output

    def pair(self, value: str, scale: float, zero_point: int = 128) -> str:
        settings = [
            self.constant(f"{value}.s", np.float32(scale)),
            self.constant(f"{value}.z", np.uint8(zero_point)),
        ]
        self.node("QuantizeLinear", [value, *settings], f"{value}.q")
        return self.node("DequantizeLinear", [f"{value}.q", *settings], f"{value}.dq")

    def conv(self, value: str, name: str, scale: Optional[np.ndarray] = None) -> str:
        weight = self.random.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
        scale = np.full(CHANNELS, 0.001, np.float32) if scale is None else scale
        read = [
            self.constant(f"{name}.w", weight),
            self.constant(f"{name}.ws", scale),
            self.constant(f"{name}.wz", np.zeros(CHANNELS, np.int8)),
        ]
        self.node("DequantizeLinear", read, f"{name}.wdq", axis=0)
        bias = self.constant(f"{name}.b", self.random.standard_normal(CHANNELS).astype(np.float32))
        return self.node("Conv", [value, f"{name}.wdq", bias], name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def finish(self, *outputs: str) -> Any:
        info = onnx.helper.make_tensor_value_info
        shape = [1, CHANNELS, SIZE, SIZE]
        for number, name in enumerate(outputs):
            self.node("Identity", [name], f"y{number}")
        graph = onnx.helper.make_graph(
            self.nodes,
            "net",
            [info("x", onnx.TensorProto.FLOAT, shape)],
            [info(f"y{number}", onnx.TensorProto.FLOAT, shape) for number in range(len(outputs))],
            self.constants,
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def run(proto: Any, folder: Path, optimized: bool = True) -> tuple[list[np.ndarray], list[str]]:
    """Return the outputs on one input, and the types of the nodes that ONNX Runtime executes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=WITHOUT
    )
    x = np.random.default_rng(1).standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)
    found = session.run(None, {"x": x})
    return found, [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]


def silu(net: Net, value: str) -> str:
    return net.node("Mul", [value, net.node("Sigmoid", [value], f"{value}.sigmoid")], f"{value}.silu")


def after(net: Net, kind: str) -> str:
    """Return what is between the first and the second convolution."""
    first = net.conv(net.pair("x", 0.03), "c1")
    if kind == "silu":
        return net.pair(silu(net, first), 0.02, 14)
    if kind == "relu":
        return net.pair(net.node("Relu", [first], "r"), 0.02, 0)
    if kind == "relu, zero point 128":
        return net.pair(net.node("Relu", [first], "r"), 0.03)
    if kind == "residual":
        second = net.conv(net.pair(first, 0.04), "c2")
        return net.pair(net.node("Add", [first, second], "sum"), 0.05)
    return net.pair(first, 0.04)


@pytest.mark.parametrize("kind", ["silu", "relu", "relu, zero point 128", "residual", "nothing"])
def test_quantized_convolutions_run_in_int8(kind: str, tmp_path: Path) -> None:
    net = Net()
    proto = net.finish(net.conv(after(net, kind), "last"))
    plain, _ = run(proto, tmp_path, optimized=False)
    _, before = run(proto, tmp_path)
    assert "QLinearConv" not in before, "ONNX Runtime fuses float biases now: the rewrite may be unnecessary"
    count = sum(node.op_type == "Conv" for node in proto.graph.node)

    written = write_integer_convolutions(proto, {"c1": 6.0, "c2": 6.0, "r": 6.0, "last": 9.0})

    onnx.checker.check_model(proto, full_check=True)
    found, kinds = run(proto, tmp_path)
    assert written == kinds.count("QLinearConv") == count
    assert not {"Conv", "FusedConv", "Sigmoid"}.intersection(kinds)
    # The outputs are rounded to 256 steps of 18 / 255 in the end, and those of the convolutions between to 12 / 255.
    assert np.abs(found[0] - plain[0]).max() < 0.25
    assert np.abs(found[0] - plain[0]).mean() < 0.04


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded after it", "read as it is"])
def test_the_range_before_a_silu_clips_nothing_that_shows_after_it(rounded: bool, tmp_path: Path) -> None:
    net = Net()
    first = net.conv(net.pair("x", 0.03), "c1", np.full(CHANNELS, 0.005, np.float32))
    last = silu(net, first)
    proto = net.finish(net.pair(last, 0.04, 7) if rounded else last)
    plain, _ = run(proto, tmp_path, optimized=False)
    largest = float(plain[0].max())
    assert 7 < largest < 0.04 * 248 and plain[0].min() < -0.2 and (np.abs(plain[0]) < 0.03).any()
    assert write_integer_convolutions(proto, {"c1": largest}) == 1
    found, kinds = run(proto, tmp_path)
    assert "QLinearConv" in kinds
    # Half a step before the SiLU is 0.035, and half a step after it 0.02. Below -4 a SiLU is above -0.072: a range that
    # ended there would leave up to that of what is 0.
    assert np.abs(found[0] - plain[0]).max() < 0.062
    assert np.abs(found[0] - plain[0])[np.abs(plain[0]) < 0.01].max() < 0.045


def test_a_bias_that_int32_cannot_hold_keeps_its_value(tmp_path: Path) -> None:
    """A channel whose BatchNorm gamma is next to 0 has weights next to 0, and a bias 1e12 times as large."""
    net = Net()
    scale = np.full(CHANNELS, 0.001, np.float32)
    scale[2] = 1e-14
    proto = net.finish(net.conv(net.pair("x", 0.03), "last", scale))
    plain, _ = run(proto, tmp_path, optimized=False)
    write_integer_convolutions(proto, {"last": 9.0})
    found, kinds = run(proto, tmp_path)
    assert "QLinearConv" in kinds
    assert np.abs(plain[0][:, 2]).min() > 0.1, "the bias has to be something"
    assert np.abs(found[0] - plain[0]).max() < 0.06


def test_without_a_known_range_a_convolution_stays_as_it_is(tmp_path: Path) -> None:
    net = Net()
    proto = net.finish(net.conv(net.pair("x", 0.03), "last"))
    plain, _ = run(proto, tmp_path, optimized=False)
    assert write_integer_convolutions(proto, {}) == 0
    found, kinds = run(proto, tmp_path)
    assert "QLinearConv" not in kinds
    np.testing.assert_allclose(found[0], plain[0], atol=1e-4)


def test_all_readers_of_a_rounded_output_read_it_rounded(tmp_path: Path) -> None:
    """ONNX Runtime computes a convolution in INT8 only if nothing reads its float output."""
    net = Net()
    first = net.conv(net.pair("x", 0.03), "c1")
    last = net.conv(net.pair(first, 0.05), "last")
    proto = net.finish(last, first)
    assert write_integer_convolutions(proto, {"c1": 6.0, "last": 9.0}) == 2
    found, kinds = run(proto, tmp_path)
    assert kinds.count("QLinearConv") == 2
    steps = found[1] / np.float32(0.05)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)  # by the pair that was there, not by another one


@pytest.mark.parametrize("value", [0.01, 0.5, 1.0, 7.0, 200.0])
def test_silu_inverse(value: float) -> None:
    x = _silu_inverse(value)
    assert x / (1 + np.exp(-x)) == pytest.approx(value, rel=1e-5)
