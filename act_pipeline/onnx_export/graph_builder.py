"""An ONNX graph under construction: names, constants, Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.graph.int8_rounding import to_int8, unsigned_range
from act_pipeline.onnx_export.program import QuantizedTensor, Source

ONNX_PACKAGE = 'pip install "act_pipeline[onnx]", or -r requirements/cpu.txt'


def require_onnx() -> Any:
    """Import and return ``onnx``.

    Raises:
        UserError: it cannot be imported; the message names the extra that installs it.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"onnx cannot be imported ({error}); install it: {ONNX_PACKAGE}") from None
    return onnx


class GraphBuilder:
    """Collects the nodes and initializers of an ONNX graph.

    Attributes:
        opset: opset of the graph.
        nodes: the ONNX nodes in order.
        initializers: name -> ONNX tensor.
        values: Paddle name -> ONNX name of a computed tensor.
        constants: Paddle name -> value of a constant.
        quantized, rounded, shapes, dtypes: as in :class:`act_pipeline.onnx_export.program.Source`.
        unit_scales: whether activations are divided by their scale and then rounded with scale 1. The scale becomes a
            factor of the weights, or of the product of two activations. The integers are the same. A TensorRT-RTX plan
            contains one kernel, with 133 kB of source, for each different scale of a Q/DQ pair.
    """

    def __init__(self, source: Source, activation_dtype: str, opset: int, unit_scales: bool = False) -> None:
        self.onnx = require_onnx()
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.values: dict[str, str] = {name: name for name in source.inputs}
        self.constants: dict[str, np.ndarray] = dict(source.constants)
        self.quantized = source.quantized
        self.rounded = source.rounded
        self.shapes = source.shapes
        self.dtypes = source.dtypes
        self._zero_point = np.array(128, np.uint8) if activation_dtype == "uint8" else np.array(0, np.int8)
        self.unit_scales = unit_scales
        self._made: dict[Any, str] = {}
        self._rounded_at_run_time: dict[tuple[str, bool], list[str]] = {}
        self._count = 0

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{hint}/{self._count}"

    def initializer(self, value: np.ndarray | np.generic, hint: str = "constant") -> str:
        """Return the name of an initializer; equal constants are stored once.

        Args:
            value: the constant.
            hint: beginning of the name of a new initializer.
        """
        value = np.ascontiguousarray(value).reshape(np.shape(value))
        key = ("constant", value.dtype.str, value.shape, value.tobytes())
        if key not in self._made:
            name = self.fresh(hint)
            self.initializers[name] = self.onnx.numpy_helper.from_array(value, name)
            self._made[key] = name
        return self._made[key]

    def ints(self, *numbers: int) -> str:
        return self.initializer(np.array(numbers, np.int64))

    def node(self, kind: str, inputs: list[str], hint: str = "", outputs: int = 1, **attrs: Any) -> Any:
        """Add a node.

        Args:
            kind: the ONNX op type.
            inputs: names of its inputs.
            hint: beginning of the names of its outputs; empty: ``kind``.
            outputs: number of outputs.
            **attrs: its attributes.

        Returns:
            Name of the output; a list of names if there are several.
        """
        names = [self.fresh(hint or kind) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, name=names[0], **attrs))
        return names[0] if outputs == 1 else names

    def scalar(self, number: float, like: str) -> str:
        """Return the name of a scalar constant of the element type of a tensor.

        Args:
            number: the value; one that the type cannot hold becomes the nearest it can.
            like: Paddle name of the tensor.
        """
        dtype: Any = np.dtype(self.dtypes.get(like, np.float32))
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            number = min(max(int(number), int(limits.min)), int(limits.max))
        return self.initializer(np.array(number, dtype))

    def cast(self, value: str, dtype: Any, hint: str = "") -> str:
        """Add a Cast to a NumPy type and return the name of its output."""
        return self.node("Cast", [value], hint, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, value: str, *sizes: int, hint: str = "") -> str:
        """Add a Reshape and return the name of its output; a size of 0 keeps the size of that axis."""
        return self.node("Reshape", [value, self.ints(*sizes)], hint)

    def reduce(self, kind: str, value: str, axes: Sequence[int], keep: bool, hint: str = "") -> str:
        """Add a reduction and return the name of its output; its axes are an attribute or an input by opset."""
        if kind == "ReduceSum" or self.opset >= 18:
            return self.node(kind, [value, self.ints(*axes)], hint, keepdims=int(keep))
        return self.node(kind, [value], hint, axes=list(axes), keepdims=int(keep))

    def get(self, name: str) -> str:
        """Return the ONNX name of a Paddle tensor; the Q/DQ pair of a quantized one is added on first use."""
        if name in self.quantized:
            tensor = self.quantized[name]
            made, divisor = self.dequantized(tensor), self.divisor(tensor)
            key = ("multiplied", made)
            if divisor != 1 and key not in self._made:
                self._made[key] = self.node("Mul", [made, self.initializer(divisor, f"{name}.scale")], name)
            return self._made.get(key, made)
        if name in self.values:
            return self.values[name]
        return self.initializer(self.constants[name], name)

    def divisor(self, tensor: QuantizedTensor) -> np.float32:
        """Return what :meth:`dequantized` divides a tensor by: its scale with ``unit_scales``, else 1."""
        activation = tensor.weight is None and tensor.source not in self.constants
        return np.float32(tensor.scale.reshape(())[()]) if self.unit_scales and activation else np.float32(1)

    def dequantized(self, tensor: QuantizedTensor, transposed: bool = False, channel_axis: int = -1) -> str:
        """Return the ONNX name of a dequantized tensor; its nodes are added once and shared by all readers.

        With ``unit_scales`` an activation is divided by its scale (:meth:`divisor`), which the reader makes up for.

        Args:
            tensor: the quantized tensor.
            transposed: swap the last two axes. The swap comes before the rounding, so that the Q/DQ pair is adjacent
                to the op that computes in INT8.
            channel_axis: with ``unit_scales``, the axis along which the divisor is stored as a vector.
        """
        constant = tensor.weight
        if constant is None and tensor.source in self.constants:
            constant = to_int8(self.constants[tensor.source], tensor.scale).astype(np.int8)
        key = ("dq", tensor.source, tensor.range_key, transposed, self.unit_scales and channel_axis)
        if key in self._made:
            return self._made[key]
        if constant is not None:
            scale = self.initializer(tensor.scale, f"{tensor.source}.scale")
            axis = tensor.axis % constant.ndim if tensor.scale.ndim else 0
            if transposed:
                constant = np.swapaxes(constant, -1, -2)
                axis = {constant.ndim - 1: constant.ndim - 2, constant.ndim - 2: constant.ndim - 1}.get(axis, axis)
            zero = self.initializer(np.zeros(tensor.scale.shape, np.int8), "zero_point")
            weight = self.initializer(constant, f"{tensor.source}.int8")
            attrs = {"axis": axis} if tensor.scale.ndim else {}
            made = self.node("DequantizeLinear", [weight, scale, zero], f"{tensor.source}.dequantized", **attrs)
        else:
            value = self.get(tensor.source)
            if transposed:
                value = self.swap_last(value, tensor.source)
            if tensor.source in self.rounded:
                return value
            if self.unit_scales:
                value = self._divided(value, tensor, transposed, channel_axis)
            step, zero_point = self._range(tensor)
            scale = self.initializer(step, "unit_scale" if self.unit_scales else f"{tensor.source}.scale")
            zero = self.initializer(zero_point, "zero_point")
            rounded = self.node("QuantizeLinear", [value, scale, zero], f"{tensor.source}.quantized")
            if tensor.shifted:
                zero = self.initializer(np.uint8(0), "zero_point")
            made = self.node("DequantizeLinear", [rounded, scale, zero], f"{tensor.source}.dequantized")
        self._made[key] = made
        return made

    def dynamically_quantized(self, name: str, transposed: bool = False) -> list[str]:
        """Return the ONNX names of a float tensor in uint8, its scale and its zero point, by its range at run time.

        Args:
            name: Paddle name of the tensor.
            transposed: swap the last two axes.
        """
        key = (name, transposed)
        if key not in self._rounded_at_run_time:
            value = self.swap_last(self.get(name), name) if transposed else self.get(name)
            self._rounded_at_run_time[key] = self.node("DynamicQuantizeLinear", [value], f"{name}.quantized", 3)
        return self._rounded_at_run_time[key]

    def _range(self, tensor: QuantizedTensor) -> tuple[np.ndarray | np.float32, np.ndarray | np.uint8]:
        """Return the scale and the zero point that an activation is rounded with."""
        if self.unit_scales:
            return np.float32(1), self._zero_point
        if self._zero_point.dtype == np.uint8:
            step, zero_point = unsigned_range(tensor.threshold, tensor.lowest)
            if zero_point != self._zero_point:
                return np.float32(step), np.uint8(zero_point)
        return tensor.scale, self._zero_point

    def swap_last(self, value: str, name: str) -> str:
        rank = len(self.shapes[name])
        return self.node("Transpose", [value], perm=[*range(rank - 2), rank - 1, rank - 2])

    def _divided(self, value: str, tensor: QuantizedTensor, transposed: bool, channel_axis: int) -> str:
        shape = list(self.shapes[tensor.source])
        if transposed:
            shape[-2:] = shape[:-3:-1]
        channels = max(shape[channel_axis], 1)
        steps = np.full([channels, *(1,) * (len(shape) - 1 - channel_axis % len(shape))], 1 / tensor.scale, np.float32)
        return self.node("Mul", [value, self.initializer(steps, f"{tensor.source}.steps")])
