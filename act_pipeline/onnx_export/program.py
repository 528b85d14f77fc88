"""A Paddle program as plain data: ops without observers, constants, and quantized tensors with their scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.graph.int8_rounding import LEVELS, to_int8, unsigned_range
from act_pipeline.graph.op_types import CONVOLUTIONS, LOWEST
from act_pipeline.graph.static_graph import StaticGraph

# Paddle 2.6's quantize_linear: round(x / scale * 127), ties to even, clipped to [-128, 127].
QUANTIZATION_STEPS = np.float32(127)
# VarType.Type of framework.proto (Paddle 2.6).
DTYPES = {
    0: np.bool_, 1: np.int16, 2: np.int32, 3: np.int64, 4: np.float16, 5: np.float32, 6: np.float64, 20: np.uint8,
    21: np.int8,
}  # fmt: skip
TRANSPOSED_CONVOLUTIONS = ("conv2d_transpose", "depthwise_conv2d_transpose")
PRODUCTS = ("matmul_v2", "matmul", "mul", "bmm")
# Op types whose inputs may be rounded: those of PaddleSlim's quantize_op_types and their relatives.
INT8_OPS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *PRODUCTS)


@dataclass
class Op:
    """A Paddle op.

    Attributes:
        type: the op type.
        inputs: slot -> names of tensors.
        outputs: slot -> names of tensors.
        attrs: attribute name -> value.
    """

    type: str
    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]
    attrs: dict[str, Any]

    def input(self, slot: str) -> str:
        return self.inputs[slot][0]

    @property
    def operands(self) -> tuple[str, str]:
        """Slots of the activation and of the weight, or of both factors, of an op of :data:`INT8_OPS`."""
        return ("X", "Y") if self.type in PRODUCTS else ("Input", "Filter")

    @property
    def output(self) -> str:
        """Name of the first tensor of ``Out``, ``Output`` or ``Y``, otherwise of the first output slot."""
        for slot in ("Out", "Output", "Y"):
            if self.outputs.get(slot):
                return self.outputs[slot][0]
        return next(iter(self.outputs.values()))[0]


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: x is replaced with ``round(x / scale) * scale``, with integers in [-128, 127].

    Attributes:
        source: name of the float tensor; for a weight, name of the integer tensor.
        scale: float32 of shape [] or [channels], in ONNX's convention (Paddle's scale divided by 127).
        axis: axis of the channels; -1 for a single scale.
        weight: int8; None for a tensor that is quantized at run time.
        lowest: the least value of an activation on the calibration images, for runtimes with zero points
            (:func:`act_pipeline.graph.int8_rounding.unsigned_range`); None: not known, or the zero point is 128.
        shifted: whether runtimes with zero points read the activation without subtracting its zero point, so that all
            values are at least 0 (`onnx_export.rewrites.zero_points`).
    """

    source: str
    scale: np.ndarray
    axis: int = -1
    weight: np.ndarray | None = None
    lowest: float | None = None
    shifted: bool = False

    @property
    def threshold(self) -> float:
        """The largest value of an activation, 127 steps when it is rounded symmetrically."""
        return float(self.scale) * LEVELS

    @property
    def range_key(self) -> tuple[bytes, float | None, bool]:
        """What distinguishes the roundings of one tensor."""
        return self.scale.tobytes(), self.lowest, self.shifted

    @property
    def shift(self) -> float:
        """What a runtime with zero points adds to the values of a ``shifted`` activation; else 0."""
        step, zero_point = unsigned_range(self.threshold, self.lowest)
        return float(np.float32(step)) * zero_point if self.shifted else 0.0


@dataclass
class Source:
    """A program to export.

    Attributes:
        ops: the ops in order, without feed, fetch, Q/DQ and observers.
        constants: name -> value of every parameter.
        quantized: name of a dequantized tensor, as ops read it -> the quantized tensor.
        shapes: name -> shape, -1 where unknown.
        dtypes: name -> NumPy type of the variable in the program.
        inputs: names of the inputs.
        outputs: names of the outputs.
        rounded: names of tensors that hold only elements of rounded tensors, and so need no Q/DQ pair.
        exposed: name of an output -> its name in the ONNX file, where that is another one.
        ranges: name of an observed tensor -> its largest absolute value in calibration or training.
    """

    ops: list[Op] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, type] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    rounded: set[str] = field(default_factory=set)
    exposed: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)


def read_source(graph: StaticGraph) -> Source:
    """Read the program of a graph.

    Q/DQ pairs marked ``only_observer`` are dropped: training recorded their scales but did not round with them.

    Args:
        graph: the loaded Paddle model; not changed.

    Returns:
        The program as plain data.
    """
    block = graph.program.global_block()
    source = Source(inputs=list(graph.feed_names), outputs=[target.name for target in graph.fetch_targets])
    alias: dict[str, str] = {}
    observed: dict[str, str] = {}
    pending: dict[str, QuantizedTensor] = {}
    for name in block.vars:
        if graph.is_parameter(name):
            source.constants[name] = graph.parameter(name)
    for name in (*source.inputs, *source.outputs):
        _describe(source, block, name)
    for raw in block.ops:
        if raw.type in ("feed", "fetch"):
            continue
        inputs = {
            slot: [_resolve(name, raw.type, alias, source) for name in raw.input(slot)]
            for slot in raw.input_names
            if raw.input(slot)
        }
        outputs = {slot: list(raw.output(slot)) for slot in raw.output_names if raw.output(slot)}
        for name in {name for names in (*inputs.values(), *outputs.values()) for name in names}:
            _describe(source, block, name)
        if raw.type == "quantize_linear":
            if _is_observer(raw):
                observed[outputs["Y"][0]] = inputs["X"][0]
                source.ranges[inputs["X"][0]] = float(source.constants[inputs["Scale"][0]].reshape(-1)[0])
            else:
                scale = source.constants[inputs["Scale"][0]].astype(np.float32).reshape(-1) / QUANTIZATION_STEPS
                lowest = float(raw.attr(LOWEST)) if raw.has_attr(LOWEST) else None
                pending[outputs["Y"][0]] = QuantizedTensor(inputs["X"][0], scale[0].reshape(()), lowest=lowest)
        elif raw.type == "dequantize_linear":
            name, output = inputs["X"][0], outputs["Y"][0]
            if _is_observer(raw):
                alias[output] = observed[name]
            elif name in pending:
                source.quantized[output] = pending[name]
            else:
                source.quantized[output] = _weight(source, raw, name, inputs["Scale"][0])
        else:
            attrs = {name: raw.attr(name) for name in raw.attr_names if name != "op_callstack"}
            source.ops.append(Op(raw.type, inputs, outputs, attrs))
            if attrs.get("out_threshold"):
                source.ranges[source.ops[-1].output] = float(attrs["out_threshold"])
    return source


def _describe(source: Source, block: Any, name: str) -> None:
    if name not in source.shapes and block.has_var(name):
        source.shapes[name] = tuple(block.var(name).shape)
        source.dtypes[name] = DTYPES.get(int(block.var(name).dtype), np.float32)


def _resolve(name: str, op_type: str, alias: dict[str, str], source: Source) -> str:
    """Return the tensor that an op reads without observers: INT8 ops read the rounded tensor, others the float one.

    PaddleSlim's ACT uses the same names for the observing and the rounding Q/DQ pair of a tensor.
    """
    if op_type == "dequantize_linear" or (op_type in INT8_OPS and name in source.quantized):
        return name
    return alias.get(name, name)


def _is_observer(raw: Any) -> bool:
    return bool(raw.has_attr("only_observer") and raw.attr("only_observer"))


def _weight(source: Source, raw: Any, name: str, scale_name: str) -> QuantizedTensor:
    scale = source.constants[scale_name].astype(np.float32).reshape(-1) / QUANTIZATION_STEPS
    weight = source.constants[name]
    if weight.dtype != np.int8:
        weight = to_int8(weight, 1).astype(np.int8)
    # A channel without any weight has the scale zero, which is no scale to a runtime.
    scale = np.where(scale == 0, np.float32(1), scale)
    if scale.size == 1:
        return QuantizedTensor(name, scale[0].reshape(()), -1, weight)
    return QuantizedTensor(name, scale, int(raw.attr("quant_axis")), weight)
