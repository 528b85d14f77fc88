"""Export rules of activation functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import Rule, channels_first
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

# Paddle op type -> ONNX op type, and ONNX attribute -> Paddle attribute with its default.
_DIRECT: dict[str, tuple[str, dict[str, tuple[str, float]]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "softsign": ("Softsign", {}),
    # Paddle 2.6's kernel ignores the attributes threshold, scale and offset, and computes as ONNX does.
    "hard_swish": ("HardSwish", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": ("alpha", 0.02)}),
    "elu": ("Elu", {"alpha": ("alpha", 1.0)}),
    "celu": ("Celu", {"alpha": ("alpha", 1.0)}),
    "selu": ("Selu", {"gamma": ("scale", 1.0507009873554804934), "alpha": ("alpha", 1.6732632423543772848)}),
    "thresholded_relu": ("ThresholdedRelu", {"alpha": ("threshold", 1.0)}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": ("slope", 1 / 6), "beta": ("offset", 0.5)}),
}
# Above it softplus(x) equals x in float32.
_LINEAR = 17


def _direct(build: GraphBuilder, op: Op) -> str:
    kind, attributes = _DIRECT[op.type]
    attrs: dict[str, Any] = {name: float(op.attrs.get(key, default)) for name, (key, default) in attributes.items()}
    return build.node(kind, [build.get(op.input("X"))], op.output, **attrs)


def _silu(build: GraphBuilder, op: Op) -> str:
    value, beta = build.get(op.input("X")), float(op.attrs.get("beta", 1.0))
    steep = value if beta == 1 else build.node("Mul", [value, build.scalar(beta, op.input("X"))])
    return build.node("Mul", [value, build.node("Sigmoid", [steep])], op.output)


def _gelu(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    value = build.get(name)
    if op.attrs.get("approximate"):
        cube = build.node("Mul", [value, build.node("Mul", [value, value])])
        inner = build.node("Add", [value, build.node("Mul", [cube, build.scalar(0.044715, name)])])
        bent = build.node("Tanh", [build.node("Mul", [inner, build.scalar(math.sqrt(2 / math.pi), name)])])
    else:
        bent = build.node("Erf", [build.node("Div", [value, build.scalar(math.sqrt(2), name)])])
    product = build.node("Mul", [value, build.node("Add", [bent, build.scalar(1, name)])])
    return build.node("Mul", [product, build.scalar(0.5, name)], op.output)


def _softplus_of(build: GraphBuilder, name: str, value: str, threshold: float) -> str:
    """Return softplus of a value, which is the value itself above the threshold."""
    made = build.node("Softplus", [value])
    if threshold >= _LINEAR:
        return made
    return build.node("Where", [build.node("Greater", [value, build.scalar(threshold, name)]), value, made])


def _softplus(build: GraphBuilder, op: Op) -> str:
    name, beta = op.input("X"), float(op.attrs.get("beta", 1.0))
    value, threshold = build.get(name), float(op.attrs.get("threshold", 20.0))
    if beta == 1:
        return _softplus_of(build, name, value, threshold)
    made = _softplus_of(build, name, build.node("Mul", [value, build.scalar(beta, name)]), threshold)
    return build.node("Div", [made, build.scalar(beta, name)], op.output)


def _mish(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    value = build.get(name)
    bent = build.node("Tanh", [_softplus_of(build, name, value, float(op.attrs.get("threshold", 20.0)))])
    return build.node("Mul", [value, bent], op.output)


def _log_sigmoid(build: GraphBuilder, op: Op) -> str:
    negative = build.node("Neg", [build.get(op.input("X"))])
    return build.node("Neg", [build.node("Softplus", [negative])], op.output)


def _between(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    if op.type == "relu6":
        low, high = 0.0, float(op.attrs.get("threshold", 6.0))
    else:
        low, high = float(op.attrs["t_min"]), float(op.attrs["t_max"])
    return build.node("Clip", [build.get(name), build.scalar(low, name), build.scalar(high, name)], op.output)


def _prelu(build: GraphBuilder, op: Op) -> str:
    channels_first(op)
    name, alpha = op.input("X"), op.input("Alpha")
    rank = len(build.shapes[name])
    # all: one slope; channel: one for each channel; element: one for each element of an image.
    sizes = {"all": [1], "channel": [-1] + [1] * (rank - 2)}.get(str(op.attrs["mode"]), build.shapes[name][1:])
    if alpha in build.constants:
        slope = build.initializer(build.constants[alpha].reshape(sizes), alpha)
    else:
        slope = build.reshape(build.get(alpha), *sizes)
    return build.node("PRelu", [build.get(name), slope], op.output)


def _dropout(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    kept = 1 - float(op.attrs.get("dropout_prob", 0.5))
    if op.attrs.get("dropout_implementation") == "upscale_in_train" or kept == 1:
        return build.get(name)
    return build.node("Mul", [build.get(name), build.initializer(np.float32(kept))], op.output)


RULES: dict[str, Rule] = {
    **{kind: _direct for kind in _DIRECT},
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "mish": _mish,
    "logsigmoid": _log_sigmoid,
    "relu6": _between,
    "brelu": _between,
    "prelu": _prelu,
    "dropout": _dropout,
}
