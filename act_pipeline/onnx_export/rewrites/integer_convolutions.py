"""Convolutions in the form that ONNX Runtime computes in INT8, ``QLinearConv``: rounded outputs and integer biases.

On CPUs, ONNX Runtime 1.31 has no fast convolution from INT8 to float (``ConvInteger`` took nine times as long as the
float convolution, YOLOv8n). It makes a ``QLinearConv`` of a Conv whose operands all come from a DequantizeLinear, the
bias from int32, and whose only reader is a QuantizeLinear, with at most a ReLU between. All other convolutions stay
float, and the Q/DQ pairs before them only cost time. So here

- biases become int32, with the scale of the products;
- an output that is not rounded gets a Q/DQ pair. Its range is what the next rounding can represent, where a SiLU is
  between, otherwise the range that was observed in calibration;
- what reads a rounded output beside its Q/DQ pair reads the rounded values;
- SiLU is written as ONNX Runtime's own ``QuickGelu``: the runtime does not fuse a Sigmoid and a Mul behind a Q/DQ pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DOMAIN = "com.microsoft"
_LEVELS = 255
# SiLU is within 0.003 of 0 below -8.
_SILU_IS_ZERO = 8.0
# A sum of products and a bias has to fit into int32.
_LARGEST_BIAS = 2.0**30


def write_integer_convolutions(proto: Any, ranges: Mapping[str, float]) -> int:
    """Rewrite the convolutions whose input and weight are dequantized; all others stay as they are.

    Args:
        proto: an ``onnx.ModelProto`` with unique names, changed in place. Activations are uint8.
        ranges: name of a tensor -> the largest absolute value that calibration observed.

    Returns:
        Number of convolutions that ONNX Runtime computes in INT8.
    """
    return _Rewrite(proto, ranges).run()


class _Rewrite:
    """One run over a graph: its nodes, constants and readers, kept up to date."""

    def __init__(self, proto: Any, ranges: Mapping[str, float]) -> None:
        import onnx

        self.onnx, self.proto, self.graph, self.ranges = onnx, proto, proto.graph, ranges
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.after: dict[str, list[Any]] = {}
        self.before: dict[str, list[Any]] = {}
        self.removed: set[str] = set()

    def run(self) -> int:
        found = [node for node in self.graph.node if node.op_type == "Conv" and self._has_int8_operands(node)]
        written = [node for node in found if self._round_output(node)]
        for node in written:
            self._make_bias_integer(node)
        nodes = []
        for node in self.graph.node:
            if node.output[0] not in self.removed:
                nodes += [*self.before.get(node.name, []), node, *self.after.get(node.name, [])]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        if any(node.domain == DOMAIN for node in nodes):
            self.proto.opset_import.append(self.onnx.helper.make_opsetid(DOMAIN, 1))
        return len(written)

    def _has_int8_operands(self, conv: Any) -> bool:
        value, weight = (self.producer.get(name) for name in conv.input[:2])
        return (
            value is not None
            and weight is not None
            and value.op_type == weight.op_type == "DequantizeLinear"
            and weight.input[0] in self.constants
            and self._value(value.input[1]).size == 1
        )

    def _round_output(self, conv: Any) -> bool:
        """Let the output, or the ReLU's that alone reads it, be read through one Q/DQ pair; return whether it is."""
        last, name = conv, conv.output[0]
        relu = self._only_reader(name, "Relu")
        if relu is not None:
            last, name = relu, relu.output[0]
        readers = self.readers.get(name, [])
        silu = self._silu(name)
        quantize = [node for node in readers if node.op_type == "QuantizeLinear"]
        if relu is not None and len(quantize) == 1:
            self._round_from_zero(quantize[0])
        if len(quantize) == 1 and (relu is None or not self._value(quantize[0].input[2]).any()):
            pair = self._only_reader(quantize[0].output[0], "DequantizeLinear")
            others = [node for node in readers if node is not quantize[0]]
            if not others:
                return True
            if pair is not None and list(pair.input[1:]) == list(quantize[0].input[1:]):
                # The pair moves up to its tensor, before the other readers.
                self.removed.update((quantize[0].output[0], pair.output[0]))
                moved = [self._copy(quantize[0]), self._copy(pair)]
                self.after[last.name] = moved
                self._redirect(name, others, pair.output[0])
                self._fuse(silu, pair.output[0])
                return True
        limits = self._limits(name, silu)
        if relu is not None and quantize and len(quantize) == len(readers):
            high = max(self._highest(node) for node in quantize)
            limits = (0.0, high)
        if limits is None:
            return False
        low, high = (0.0, limits[1]) if relu is not None else limits
        step = (high - low) / _LEVELS
        zero_point = np.uint8(round(-low / step))
        scale, zero = self._constant(f"{name}/step", np.float32(step)), self._constant(f"{name}/zero", zero_point)
        rounded, result = f"{name}/rounded", f"{name}/rounded/dequantized"
        node = self.onnx.helper.make_node
        if relu is not None:  # rounding with the zero point 0 does what it does
            self.removed.add(name)
        self.after[conv.name] = [
            node("QuantizeLinear", [conv.output[0], scale, zero], [rounded], name=rounded),
            node("DequantizeLinear", [rounded, scale, zero], [result], name=result),
        ]
        self._redirect(name, readers, result)
        self._fuse(silu, result)
        return True

    def _round_from_zero(self, quantize: Any) -> None:
        """Give the Q/DQ pair after a ReLU the zero point 0, which ONNX Runtime needs, and twice as many steps."""
        pairs = self.readers.get(quantize.output[0], [])
        if not self._value(quantize.input[2]).any() or any(pair.input[1:] != quantize.input[1:] for pair in pairs):
            return
        name = quantize.output[0]
        step = self._constant(f"{name}/step", np.float32(self._highest(quantize) / _LEVELS))
        zero = self._constant(f"{name}/zero", np.uint8(0))
        for node in (*pairs, quantize):
            node.input[1], node.input[2] = step, zero

    def _silu(self, name: str) -> tuple[Any, Any] | None:
        """Return the Sigmoid and the Mul of a SiLU that alone reads a tensor."""
        readers = self.readers.get(name, [])
        sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
        if sigmoid is None or len(readers) != 2:
            return None
        mul = self._only_reader(sigmoid.output[0], "Mul")
        return (sigmoid, mul) if mul is not None and {name, sigmoid.output[0]} == set(mul.input) else None

    def _limits(self, name: str, silu: tuple[Any, Any] | None) -> tuple[float, float] | None:
        """Return the range to round a tensor to; None: unknown."""
        observed = self.ranges.get(name)
        if silu is not None:
            quantize = self._only_reader(silu[1].output[0], "QuantizeLinear")
            if quantize is not None:
                high = _silu_inverse(self._highest(quantize))
                return -min(_SILU_IS_ZERO, observed or _SILU_IS_ZERO), high
            return (-min(_SILU_IS_ZERO, observed), observed) if observed else None
        return (-observed, observed) if observed else None

    def _highest(self, quantize: Any) -> float:
        """Return the largest value that a QuantizeLinear to uint8 represents."""
        return float(self._value(quantize.input[1])) * (_LEVELS - int(self._value(quantize.input[2])))

    def _fuse(self, silu: tuple[Any, Any] | None, value: str) -> None:
        if silu is None:
            return
        sigmoid, mul = silu
        self.removed.add(sigmoid.output[0])
        mul.op_type, mul.domain = "QuickGelu", DOMAIN
        del mul.input[:]
        mul.input.append(value)
        mul.attribute.append(self.onnx.helper.make_attribute("alpha", 1.0))

    def _make_bias_integer(self, conv: Any) -> None:
        if len(conv.input) < 3:
            return
        value, weight = (self.producer[name] for name in conv.input[:2])
        bias = self._value(conv.input[2]).astype(np.float64)
        integers = self._value(weight.input[0])
        step = float(self._value(value.input[1]))
        scales = np.broadcast_to(self._value(weight.input[1]).reshape(-1).astype(np.float64), bias.shape)
        # A channel whose weights are next to nothing beside its bias has a scale in which int32 cannot hold the bias.
        least = np.abs(bias) / (step * _LARGEST_BIAS)
        if (scales < least).any():
            factors = np.where(scales < least, scales / np.maximum(least, np.finfo(np.float64).tiny), 1.0)
            shape = (-1, *(1,) * (integers.ndim - 1))
            scales = np.maximum(scales, least)
            inputs = [
                self._constant(f"{conv.name}/weight", np.rint(integers * factors.reshape(shape)).astype(np.int8)),
                self._constant(f"{conv.name}/weight/scale", scales.astype(np.float32)),
                self._constant(f"{conv.name}/weight/zero", np.zeros(bias.shape, np.int8)),
            ]
            conv.input[1] = self._dequantized(conv, inputs, "weight")
        product = np.float32(step) * scales.astype(np.float32)
        inputs = [
            self._constant(f"{conv.name}/bias", np.rint(bias / product).astype(np.int32)),
            self._constant(f"{conv.name}/bias/scale", product.astype(np.float32)),
            self._constant(f"{conv.name}/bias/zero", np.zeros(bias.shape, np.int32)),
        ]
        conv.input[2] = self._dequantized(conv, inputs, "bias")

    def _dequantized(self, conv: Any, inputs: list[str], what: str) -> str:
        name = f"{conv.name}/{what}/dequantized"
        node = self.onnx.helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=0)
        self.before.setdefault(conv.name, []).append(node)
        return name

    def _only_reader(self, name: str, kind: str) -> Any:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def _redirect(self, name: str, readers: list[Any], result: str) -> None:
        for node in readers:
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = result

    def _value(self, name: str) -> np.ndarray:
        return np.asarray(self.onnx.numpy_helper.to_array(self.constants[name]))

    def _constant(self, name: str, value: Any) -> str:
        tensor = self.onnx.numpy_helper.from_array(np.asarray(value), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def _copy(self, node: Any) -> Any:
        copy = self.onnx.NodeProto()
        copy.CopyFrom(node)
        return copy


def _silu_inverse(value: float) -> float:
    """Return the positive x with ``x * sigmoid(x) == value``."""
    x = max(value, 1e-6)
    for _ in range(50):  # x * sigmoid(x) <= x, and the difference vanishes for large x
        x = value * (1 + float(np.exp(-x)))
    return x
