"""Export rules of ops that compute values: elementwise ops, norms, reductions, pooling and sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, refuse
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op
from act_pipeline.onnx_export.quantized_ops import pads

_SIMPLE = {"relu": "Relu", "sigmoid": "Sigmoid", "log": "Log", "floor": "Floor"}
_BINARY = {
    "elementwise_add": "Add",
    "elementwise_sub": "Sub",
    "elementwise_mul": "Mul",
    "elementwise_div": "Div",
    # RT-DETR divides indices, which are not negative: there Paddle's floor and ONNX's truncation agree.
    "elementwise_floordiv": "Div",
    "elementwise_mod": "Mod",
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}


def _trailing(build: GraphBuilder, op: Op) -> int:
    """Return how many axes to append to the second operand, because ONNX, like NumPy, aligns the last axes."""
    axis, ranks = int(op.attrs.get("axis", -1)), [len(build.shapes[op.input(slot)]) for slot in ("X", "Y")]
    return max(ranks[0] - axis - ranks[1], 0) if axis >= 0 and ranks[1] > 0 else 0


def _binary(build: GraphBuilder, op: Op) -> str:
    left, right, trailing = op.input("X"), op.input("Y"), _trailing(build, op)
    operand = build.get(right)
    if trailing:
        if right in build.constants:
            value = build.constants[right]
            operand = build.initializer(value.reshape(value.shape + (1,) * trailing), right)
        else:
            rank = len(build.shapes[right])
            operand = build.node("Unsqueeze", [operand, build.ints(*range(rank, rank + trailing))])
    return build.node(_BINARY[op.type], [build.get(left), operand], op.output)


def _multiply(build: GraphBuilder, op: Op) -> str:
    """Add a Mul, or a Where for a mask of zeros and ones, which OpenVINO would fold into a scale and divide by."""
    mask, value = build.constants.get(op.input("Y")), op.input("X")
    if mask is None or not np.isin(mask, (0, 1)).all() or build.shapes[op.output] != build.shapes[value]:
        return _binary(build, op)
    if mask.all():
        return build.get(value)
    chosen = mask.reshape(*mask.shape, *(1,) * _trailing(build, op)).astype(bool)
    zero = build.initializer(np.zeros((), mask.dtype))
    return build.node("Where", [build.initializer(chosen, op.input("Y")), build.get(value), zero], op.output)


def _activation(build: GraphBuilder, op: Op) -> str:
    return build.node(_SIMPLE[op.type], [build.get(op.input("X"))], op.output)


def _silu(build: GraphBuilder, op: Op) -> str:
    value = build.get(op.input("X"))
    return build.node("Mul", [value, build.node("Sigmoid", [value])], op.output)


def _gelu(build: GraphBuilder, op: Op) -> str:
    if op.attrs.get("approximate"):
        raise CannotLower("its approximation by tanh is not known here")
    value = build.get(op.input("X"))
    root = build.node("Div", [value, build.initializer(np.float32(np.sqrt(2.0)))])
    shifted = build.node("Add", [build.node("Erf", [root]), build.initializer(np.float32(1))])
    product = build.node("Mul", [value, shifted])
    return build.node("Mul", [product, build.initializer(np.float32(0.5))], op.output)


def _softmax(build: GraphBuilder, op: Op) -> str:
    return build.node("Softmax", [build.get(op.input("X"))], op.output, axis=int(op.attrs["axis"]))


def _layer_norm(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["begin_norm_axis"])
    shape = build.shapes[op.input("X")][axis:]
    inputs = [build.get(op.input("X"))]
    for slot, neutral in (("Scale", 1.0), ("Bias", 0.0)):
        value = build.constants[op.input(slot)] if slot in op.inputs else np.full(shape, neutral, np.float32)
        inputs.append(build.initializer(value.reshape(shape), f"{op.output}.{slot}"))
    return build.node("LayerNormalization", inputs, op.output, axis=axis, epsilon=float(op.attrs["epsilon"]))


def _batch_norm(build: GraphBuilder, op: Op) -> str:
    names = [op.input(slot) for slot in ("X", "Scale", "Bias", "Mean", "Variance")]
    value = build.node(
        "BatchNormalization", [build.get(name) for name in names], op.output, epsilon=float(op.attrs["epsilon"])
    )
    return value


def _reduce(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["dim"]]
    if op.attrs.get("reduce_all"):
        axes = list(range(len(build.shapes[op.input("X")])))
    keep, value = int(op.attrs["keep_dim"]), build.get(op.input("X"))
    if op.type == "reduce_sum" or build.opset >= 18:
        return build.node(_REDUCTIONS[op.type], [value, build.ints(*axes)], op.output, keepdims=keep)
    return build.node(_REDUCTIONS[op.type], [value], op.output, axes=axes, keepdims=keep)


def _scale(build: GraphBuilder, op: Op) -> str:
    refuse(op, "ScaleTensor")
    value, factor, bias = build.get(op.input("X")), float(op.attrs["scale"]), float(op.attrs.get("bias", 0.0))
    if factor == 1 and bias == 0:
        return value
    dtype = build.dtypes.get(op.input("X"), np.float32)

    def step(kind: str, value: str, number: float) -> str:
        neutral = 1 if kind == "Mul" else 0
        return value if number == neutral else build.node(kind, [value, build.initializer(dtype(number))], op.output)

    if op.attrs.get("bias_after_scale", True):
        return step("Add", step("Mul", value, factor), bias)
    return step("Mul", step("Add", value, bias), factor)


def _clip(build: GraphBuilder, op: Op) -> str:
    refuse(op, "Min", "Max")
    bounds = [build.initializer(np.float32(op.attrs[key])) for key in ("min", "max")]
    return build.node("Clip", [build.get(op.input("X")), *bounds], op.output)


def _pool(build: GraphBuilder, op: Op) -> str:
    value, kernel = build.get(op.input("X")), list(op.attrs["ksize"])
    maximum = op.attrs["pooling_type"] == "max"
    if op.attrs.get("global_pooling") or (op.attrs.get("adaptive") and kernel == [1, 1]):
        return build.node("GlobalMaxPool" if maximum else "GlobalAveragePool", [value], op.output)
    if op.attrs.get("adaptive"):
        raise CannotLower("adaptive pooling to more than one value")
    same = op.attrs.get("padding_algorithm") == "SAME"
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": list(op.attrs["strides"]),
        "pads": pads(op, build.shapes[op.input("X")][2:], kernel, [1, 1]),
        "ceil_mode": int(bool(op.attrs.get("ceil_mode")) and not same),
    }
    if not maximum:
        attrs["count_include_pad"] = int(not op.attrs.get("exclusive", True))
    return build.node("MaxPool" if maximum else "AveragePool", [value], op.output, **attrs)


def _nearest(build: GraphBuilder, op: Op) -> str:
    refuse(op, "OutSize", "SizeTensor", "Scale")
    if op.attrs.get("align_corners"):
        raise CannotLower("align_corners is not known here")
    height, width = build.shapes[op.input("X")][2:]
    scale = list(op.attrs.get("scale") or ())
    if not scale:
        scale = [op.attrs["out_h"] / height, op.attrs["out_w"] / width]
    scales = build.initializer(np.array([1, 1, scale[0], scale[-1]], np.float32))
    return build.node(
        "Resize", [build.get(op.input("X")), "", scales], op.output,
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _grid_sample(build: GraphBuilder, op: Op) -> str:
    mode = op.attrs["mode"]
    if mode == "bilinear" and build.opset >= 20:
        mode = "linear"
    return build.node(
        "GridSample", [build.get(op.input("X")), build.get(op.input("Grid"))], op.output,
        mode=mode, padding_mode=op.attrs["padding_mode"], align_corners=int(op.attrs["align_corners"]),
    )  # fmt: skip


RULES: dict[str, Rule] = {
    **{kind: _activation for kind in _SIMPLE},
    **{kind: _binary for kind in _BINARY},
    **{kind: _reduce for kind in _REDUCTIONS},
    "elementwise_mul": _multiply,
    "silu": _silu,
    "gelu": _gelu,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "pool2d": _pool,
    "nearest_interp_v2": _nearest,
    "scale": _scale,
    "clip": _clip,
    "grid_sampler": _grid_sample,
}
