"""What a Paddle program says, in a plain form: ops without observers, constants, and who is quantized how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.graph.op_types import QUANTIZABLE_OPS
from act_pipeline.graph.static_graph import StaticGraph

# Paddle 2.6's quantize_linear: round(x / scale * 127), ties to even, clipped to [-128, 127].
QUANTIZATION_STEPS = np.float32(127)
# VarType.Type of framework.proto (Paddle 2.6).
DTYPES = {0: np.bool_, 2: np.int32, 3: np.int64, 4: np.float16, 5: np.float32, 6: np.float64}


@dataclass
class Op:
    """An op: ``inputs`` and ``outputs`` are slot -> names, ``attrs`` is name -> value."""

    type: str
    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]
    attrs: dict[str, Any]

    def input(self, slot: str) -> str:
        return self.inputs[slot][0]

    @property
    def output(self) -> str:
        """The name of the first output that carries a result."""
        for slot in ("Out", "Output", "Y"):
            if self.outputs.get(slot):
                return self.outputs[slot][0]
        return next(iter(self.outputs.values()))[0]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that is rounded: x is about ``round(x / scale) * scale`` with integers in [-128, 127].

    Attributes:
        source: name of the float tensor; for a weight, of the integers.
        scale: float32, of shape [] or [channels] (ONNX's: Paddle's divided by 127).
        axis: of the channels, -1 for one scale.
        weight: int8, None for a tensor that is quantized at run time.
    """

    source: str
    scale: np.ndarray
    axis: int = -1
    weight: np.ndarray | None = None


@dataclass
class Source:
    """A program to lower.

    Attributes:
        ops: in order, without feed, fetch, Q/DQ and observers.
        constants: name -> value of every float or integer parameter.
        quantized: name of a dequantized tensor, as ops read it -> what it stands for.
        shapes: name -> shape, -1 where unknown.
        dtypes: name -> NumPy type, as the program says.
        inputs: names.
        outputs: names.
        rounded: names of tensors that are computed from rounded ones and hold nothing else.
    """

    ops: list[Op] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, type] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    rounded: set[str] = field(default_factory=set)


def read_source(graph: StaticGraph) -> Source:
    """Read a graph; pairs marked ``only_observer`` are dropped: they are scales that were never rounding."""
    block = graph.program.global_block()
    source = Source(inputs=list(graph.feed_names), outputs=[target.name for target in graph.fetch_targets])
    alias: dict[str, str] = {}
    observed: dict[str, str] = {}
    pending: dict[str, QuantizedTensor] = {}
    # Stock ACT gives an observing and an acting pair of one tensor the same names.
    for name in block.vars:
        if graph.is_parameter(name):
            source.constants[name] = graph.parameter(name)
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
            if name not in source.shapes and block.has_var(name):
                source.shapes[name] = tuple(block.var(name).shape)
                source.dtypes[name] = DTYPES.get(int(block.var(name).dtype), np.float32)
        if raw.type == "quantize_linear":
            if _is_observer(raw):
                observed[outputs["Y"][0]] = inputs["X"][0]
            else:
                scale = source.constants[inputs["Scale"][0]].astype(np.float32).reshape(-1) / QUANTIZATION_STEPS
                pending[outputs["Y"][0]] = QuantizedTensor(inputs["X"][0], scale[0].reshape(()))
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
    return source


def _resolve(name: str, op_type: str, alias: dict[str, str], source: Source) -> str:
    """Return what an op read before observers were put in: INT8 ops their rounded inputs, all others the float ones."""
    if op_type == "dequantize_linear" or (op_type in QUANTIZABLE_OPS and name in source.quantized):
        return name
    return alias.get(name, name)


def _is_observer(raw: Any) -> bool:
    return bool(raw.has_attr("only_observer") and raw.attr("only_observer"))


def _weight(source: Source, raw: Any, name: str, scale_name: str) -> QuantizedTensor:
    scale = source.constants[scale_name].astype(np.float32).reshape(-1) / QUANTIZATION_STEPS
    weight = source.constants[name]
    if weight.dtype != np.int8:
        weight = np.clip(np.rint(weight), -128, 127).astype(np.int8)
    # A channel without any weight has the scale zero, which is no scale to a runtime.
    scale = np.where(scale == 0, np.float32(1), scale)
    if scale.size == 1:
        return QuantizedTensor(name, scale[0].reshape(()), -1, weight)
    return QuantizedTensor(name, scale, int(raw.attr("quant_axis")), weight)
