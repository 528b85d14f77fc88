"""Export rules of normalizations: of layers, batches, instances and groups, softmax, and norms of vectors."""

from __future__ import annotations

import math

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, channels_first, fixed_shape
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op


def _softmax(build: GraphBuilder, op: Op) -> str:
    kind = "LogSoftmax" if op.type == "log_softmax" else "Softmax"
    return build.node(kind, [build.get(op.input("X"))], op.output, axis=int(op.attrs.get("axis", -1)))


def _factor(build: GraphBuilder, op: Op, slot: str, neutral: float, sizes: tuple[int, ...]) -> str:
    """Return the scale or the bias of a normalization in a shape; where it is absent, the neutral value."""
    if slot not in op.inputs:
        return build.initializer(np.full(sizes, neutral, np.float32), f"{op.output}.{slot}")
    name = op.input(slot)
    if name in build.constants:
        return build.initializer(build.constants[name].reshape(sizes), f"{op.output}.{slot}")
    return build.reshape(build.get(name), *sizes)


def _layer_norm(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["begin_norm_axis"])
    shape = fixed_shape(build, op.input("X"), axis)
    inputs = [build.get(op.input("X"))]
    inputs += [_factor(build, op, slot, neutral, shape) for slot, neutral in (("Scale", 1.0), ("Bias", 0.0))]
    return build.node("LayerNormalization", inputs, op.output, axis=axis, epsilon=float(op.attrs["epsilon"]))


def _batch_norm(build: GraphBuilder, op: Op) -> str:
    channels_first(op)
    if not op.attrs.get("is_test") and not op.attrs.get("use_global_stats"):
        raise CannotLower("it is in training mode")
    names = [op.input(slot) for slot in ("X", "Scale", "Bias", "Mean", "Variance")]
    return build.node(
        "BatchNormalization", [build.get(name) for name in names], op.output, epsilon=float(op.attrs["epsilon"])
    )


def _instance_norm(build: GraphBuilder, op: Op) -> str:
    shape = build.shapes[op.input("X")]
    factors = [_factor(build, op, slot, neutral, (shape[1],)) for slot, neutral in (("Scale", 1.0), ("Bias", 0.0))]
    inputs = [build.get(op.input("X")), *factors]
    return build.node("InstanceNormalization", inputs, op.output, epsilon=float(op.attrs["epsilon"]))


def _group_norm(build: GraphBuilder, op: Op) -> str:
    """Normalize each group as one channel: ONNX has GroupNormalization from opset 21 on only in this meaning."""
    channels_first(op)
    name, groups = op.input("X"), int(op.attrs["groups"])
    shape = build.shapes[name]
    value = build.get(name)
    neutral = [build.initializer(np.full(groups, number, np.float32)) for number in (1, 0)]
    made = build.node(
        "InstanceNormalization", [build.reshape(value, 0, groups, -1), *neutral], epsilon=float(op.attrs["epsilon"])
    )
    made = build.node("Reshape", [made, build.node("Shape", [value])])
    sizes = (shape[1], *(1,) * (len(shape) - 2))
    for slot, kind in (("Scale", "Mul"), ("Bias", "Add")):
        if slot in op.inputs:
            made = build.node(kind, [made, _factor(build, op, slot, 0, sizes)], op.output)
    return made


def _p_norm(build: GraphBuilder, op: Op) -> str:
    name, order, keep = op.input("X"), float(op.attrs["porder"]), bool(op.attrs.get("keepdim"))
    axes = [int(op.attrs["axis"])]
    if op.attrs.get("asvector"):
        axes = list(range(len(build.shapes[name])))
    value = build.get(name)
    if order == 2:
        return build.reduce("ReduceL2", value, axes, keep, op.output)
    size = build.node("Abs", [value])
    if order == 1:  # OpenVINO 2026.4 ignores the axes of ReduceL1 before opset 18
        return build.reduce("ReduceSum", size, axes, keep, op.output)
    if math.isinf(order):
        return build.reduce("ReduceMax" if order > 0 else "ReduceMin", size, axes, keep, op.output)
    if order == 0:
        raise CannotLower("its order is 0")
    total = build.reduce("ReduceSum", build.node("Pow", [size, build.scalar(order, name)]), axes, keep)
    return build.node("Pow", [total, build.scalar(1 / order, name)], op.output)


RULES: dict[str, Rule] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "p_norm": _p_norm,
}
