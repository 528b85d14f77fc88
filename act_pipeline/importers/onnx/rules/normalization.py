"""Rules of normalizations and softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule, axis_of
from act_pipeline.importers.onnx.source import Node

_MAX_EPSILON = 1e-3  # of layer_norm and batch_norm in Paddle 2.6.2


def _softmax(function: str) -> Rule:
    def rule(build: Build, node: Node) -> Any:
        import paddle

        apply = getattr(paddle.nn.functional, function)
        shape = build.shape(node.inputs[0])
        value = build.value(node.inputs[0])
        axis = axis_of(int(node.attrs.get("axis", 1 if build.opset < 13 else -1)), len(shape))
        if build.opset >= 13 or axis == len(shape) - 1:
            return apply(value, axis=axis)
        # Before opset 13, the dimensions from the axis on are one.
        flat = [math.prod(shape[:axis]), math.prod(shape[axis:])]
        result = apply(build.reshape(value, shape, flat), axis=-1)
        return build.reshape(result, flat, shape)

    return rule


def _layer_normalization(build: Build, node: Node) -> Any:
    import paddle

    build.refuse_outputs(node, 1)
    shape = build.shape(node.inputs[0])
    axis = axis_of(int(node.attrs.get("axis", -1)), len(shape))
    size = math.prod(shape[axis:])
    factors: list[Any] = [None, None]
    for index, what in ((1, "scale"), (2, "bias")):
        if node.has(index):
            name = node.inputs[index]
            value = build.constant(name, what)
            full = np.broadcast_to(value, shape[axis:]) if value.size != size else value
            factors[index - 1] = build.parameter(name, full.reshape(-1), "flat" if value.ndim != 1 else "")
    epsilon, value = float(node.attrs.get("epsilon", 1e-5)), build.value(node.inputs[0])
    if epsilon <= _MAX_EPSILON:
        return paddle.nn.functional.layer_norm(value, list(shape[axis:]), *factors, epsilon)
    result = _normalized(value, list(range(axis, len(shape))), epsilon)
    for name, function in zip(node.inputs[1:], (paddle.multiply, paddle.add)):
        result = function(result, build.value(name)) if name else result
    return result


def _batch_normalization(build: Build, node: Node) -> Any:
    import paddle

    if node.attrs.get("training_mode", 0):
        raise CannotImport("its training_mode is 1, expected 0: export the model in evaluation mode")
    build.refuse_outputs(node, 1)
    names = ("scale", "bias", "mean", "variance")
    constants = [build.constant(name, what) for name, what in zip(node.inputs[1:], names)]
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    if epsilon > _MAX_EPSILON:
        constants[3], epsilon = constants[3] + np.float32(epsilon - 1e-5), 1e-5
    scale, bias, mean, variance = (
        build.parameter(name, value, what) for name, value, what in zip(node.inputs[1:], constants, names)
    )
    return paddle.nn.functional.batch_norm(
        build.value(node.inputs[0]), mean, variance, scale, bias, training=False, epsilon=epsilon
    )


def _instance_normalization(build: Build, node: Node) -> Any:
    shape = build.shape(node.inputs[0])
    return _grouped(build, node, shape[1], per_group=False)


def _group_normalization(build: Build, node: Node) -> Any:
    groups = int(node.attrs.get("num_groups", 1))
    return _grouped(build, node, groups, per_group=build.opset < 21)


def _grouped(build: Build, node: Node, groups: int, per_group: bool) -> Any:
    """Normalize groups of channels, computed in parts: mean, variance, scale and bias."""
    import paddle

    shape, value = build.shape(node.inputs[0]), build.value(node.inputs[0])
    channels = shape[1]
    if channels % groups:
        raise CannotImport(f"its {channels} channels are no multiple of {groups} groups")
    flat = [shape[0], groups, math.prod(shape[1:]) // groups]
    normalized = _normalized(build.reshape(value, shape, flat), [2], float(node.attrs.get("epsilon", 1e-5)))
    normalized = build.reshape(normalized, flat, shape)
    scale, bias = (build.constant(name, what).reshape(-1) for name, what in zip(node.inputs[1:3], ("scale", "bias")))
    if per_group:
        scale, bias = (np.repeat(each, channels // groups) for each in (scale, bias))
    along = [1, channels, *[1] * (len(shape) - 2)]
    scaled = paddle.multiply(normalized, build.parameter(node.inputs[1], scale.reshape(along), "channels"))
    return paddle.add(scaled, build.parameter(node.inputs[2], bias.reshape(along), "channels"))


def _normalized(value: Any, axes: list[int], epsilon: float) -> Any:
    import paddle

    difference = paddle.subtract(value, paddle.mean(value, axis=axes, keepdim=True))
    variance = paddle.mean(paddle.square(difference), axis=axes, keepdim=True)
    return paddle.divide(difference, paddle.sqrt(paddle.scale(variance, scale=1.0, bias=epsilon)))


def _lp_normalization(build: Build, node: Node) -> Any:
    import paddle

    order = int(node.attrs.get("p", 2))
    axis = axis_of(int(node.attrs.get("axis", -1)), build.rank(node.inputs[0]))
    value = build.value(node.inputs[0])
    if order not in (1, 2):
        raise CannotImport(f"its p is {order}, expected 1 or 2")
    size = paddle.abs(value) if order == 1 else paddle.square(value)
    total = paddle.sum(size, axis=axis, keepdim=True)
    return paddle.divide(value, total if order == 1 else paddle.sqrt(total))


RULES: dict[str, Rule] = {
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "LayerNormalization": _layer_normalization,
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization,
    "LpNormalization": _lp_normalization,
}
