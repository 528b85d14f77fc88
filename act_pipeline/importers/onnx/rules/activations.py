"""Rules of activation functions."""

from __future__ import annotations

from typing import Any

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule
from act_pipeline.importers.onnx.source import Node


def _plain(function: str) -> Rule:
    """Return the rule of a function of `paddle.nn.functional` without arguments."""

    def rule(build: Build, node: Node) -> Any:
        import paddle

        return getattr(paddle.nn.functional, function)(build.value(node.inputs[0]))

    return rule


def _with_slope(function: str, default: float) -> Rule:
    """Return the rule of a function whose one argument is the attribute ``alpha``."""

    def rule(build: Build, node: Node) -> Any:
        import paddle

        slope = float(node.attrs.get("alpha", default))
        return getattr(paddle.nn.functional, function)(build.value(node.inputs[0]), slope)

    return rule


def _hard_sigmoid(build: Build, node: Node) -> Any:
    import paddle

    slope, offset = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return paddle.nn.functional.hardsigmoid(build.value(node.inputs[0]), slope=slope, offset=offset)


def _prelu(build: Build, node: Node) -> Any:
    import paddle

    value, name = build.value(node.inputs[0]), node.inputs[1]
    slope = build.constant(name, "slope")
    rank = build.rank(node.inputs[0])
    if slope.size == 1:
        return paddle.nn.functional.prelu(value, build.parameter(name, slope.reshape(1), "one"))
    # One slope a channel, [C, 1, 1], is Paddle's own form; any other shape is computed in parts.
    if rank > 1 and slope.shape == (build.shape(node.inputs[0])[1], *[1] * (rank - 2)):
        return paddle.nn.functional.prelu(value, build.parameter(name, slope.reshape(-1), "channels"))
    positive = paddle.nn.functional.relu(value)
    return paddle.add(positive, paddle.multiply(paddle.subtract(value, positive), build.value(name)))


def _gelu(build: Build, node: Node) -> Any:
    import paddle

    approximate = node.attrs.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise CannotImport(f"its attribute approximate is {approximate!r}, expected none or tanh")
    return paddle.nn.functional.gelu(build.value(node.inputs[0]), approximate=approximate == "tanh")


def _swish(build: Build, node: Node) -> Any:
    import paddle

    alpha = float(node.attrs.get("alpha", 1.0))
    value = build.value(node.inputs[0])
    if alpha == 1:
        return paddle.nn.functional.silu(value)
    return paddle.multiply(value, paddle.nn.functional.sigmoid(paddle.scale(value, scale=alpha)))


def _selu(build: Build, node: Node) -> Any:
    import paddle

    alpha = float(node.attrs.get("alpha", 1.67326319217681884765625))
    gamma = float(node.attrs.get("gamma", 1.05070102214813232421875))
    return paddle.nn.functional.selu(build.value(node.inputs[0]), gamma, alpha)


RULES: dict[str, Rule] = {
    "Relu": _plain("relu"),
    "Sigmoid": _plain("sigmoid"),
    "Tanh": _plain("tanh"),
    "HardSwish": _plain("hardswish"),
    "Softplus": _plain("softplus"),
    "Softsign": _plain("softsign"),
    "Mish": _plain("mish"),
    "Swish": _swish,
    "LeakyRelu": _with_slope("leaky_relu", 0.01),
    "Elu": _with_slope("elu", 1.0),
    "Celu": _with_slope("celu", 1.0),
    "ThresholdedRelu": _with_slope("thresholded_relu", 1.0),
    "Selu": _selu,
    "HardSigmoid": _hard_sigmoid,
    "PRelu": _prelu,
    "Gelu": _gelu,
}
