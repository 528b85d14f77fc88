"""Rules of arithmetic, comparisons, casts and selections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule, dtype_of
from act_pipeline.importers.onnx.source import DTYPES, Node

_TWO_OPERANDS = {
    "Greater": "greater_than",
    "Less": "less_than",
    "GreaterOrEqual": "greater_equal",
    "LessOrEqual": "less_equal",
    "Equal": "equal",
    "And": "logical_and",
    "Or": "logical_or",
    "Xor": "logical_xor",
}
_ONE_OPERAND = {
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Erf": "erf",
    "Sin": "sin",
    "Cos": "cos",
    "Abs": "abs",
    "Floor": "floor",
    "Ceil": "ceil",
    "Sign": "sign",
    "Reciprocal": "reciprocal",
    "Not": "logical_not",
    "Atan": "atan",
    "IsNaN": "isnan",
}


def _operands(build: Build, node: Node) -> list[Any]:
    """Return the operands of an op that broadcasts; a scalar constant has one dimension, which Paddle prefers."""
    ranks = [build.rank(name) for name in node.inputs]
    found = []
    for name, rank in zip(node.inputs, ranks):
        value = build.constants.get(name)
        if value is not None and rank == 0 and max(ranks) > 0:
            found.append(build.add_constant(name, value.reshape(1)))
        else:
            found.append(build.value(name))
    return found


def _float_scalar(build: Build, node: Node, index: int) -> float | None:
    """Return an operand that is a finite float constant of one element and does not add dimensions; else None."""
    name, other = node.inputs[index], node.inputs[1 - index]
    value = build.scalar(name)
    if value is None or build.dtype(name) != "float32" or build.rank(name) > build.rank(other):
        return None
    return float(value) if math.isfinite(value) else None


def _add(build: Build, node: Node) -> Any:
    import paddle

    for index in (1, 0):
        shift = _float_scalar(build, node, index)
        if shift is not None:
            return paddle.scale(build.value(node.inputs[1 - index]), scale=1.0, bias=shift)
    return paddle.add(*_operands(build, node))


def _subtract(build: Build, node: Node) -> Any:
    import paddle

    shift = _float_scalar(build, node, 1)
    if shift is not None:
        return paddle.scale(build.value(node.inputs[0]), scale=1.0, bias=-shift)
    start = _float_scalar(build, node, 0)
    if start is not None:
        return paddle.scale(build.value(node.inputs[1]), scale=-1.0, bias=start)
    return paddle.subtract(*_operands(build, node))


def _multiply(build: Build, node: Node) -> Any:
    import paddle

    for index in (1, 0):
        factor = _float_scalar(build, node, index)
        if factor is not None:
            return paddle.scale(build.value(node.inputs[1 - index]), scale=factor)
    return paddle.multiply(*_operands(build, node))


def _divide(build: Build, node: Node) -> Any:
    import paddle

    divisor = _float_scalar(build, node, 1)
    if divisor is not None and divisor != 0 and math.isfinite(1 / divisor):
        return paddle.scale(build.value(node.inputs[0]), scale=1 / divisor)
    first, second = _operands(build, node)
    if "int" not in dtype_of(first):
        return paddle.divide(first, second)
    quotient = paddle.floor_divide(first, second)
    if all(build.is_index(name) for name in node.inputs):
        return quotient
    # ONNX rounds towards zero: one more where the signs differ and there is a remainder.
    remains = paddle.not_equal(paddle.multiply(quotient, second), first)
    negative = paddle.logical_xor(paddle.less_than(first, _zero(first)), paddle.less_than(second, _zero(second)))
    return paddle.add(quotient, paddle.cast(paddle.logical_and(remains, negative), dtype_of(first)))


def _zero(like: Any) -> Any:
    import paddle

    return paddle.full([1], 0, dtype_of(like))


def _power(build: Build, node: Node) -> Any:
    import paddle

    base, exponent = node.inputs
    number = build.scalar(exponent)
    if build.dtype(base) != "float32":
        raise CannotImport(f"its base is {build.dtype(base)}, expected float32")
    if number is not None and math.isfinite(number) and build.rank(exponent) <= build.rank(base):
        value = build.value(base)
        if number == 2:
            return paddle.square(value)
        return paddle.pow(value, float(number))
    first, second = _operands(build, node)
    return paddle.pow(first, second if dtype_of(second) == "float32" else paddle.cast(second, "float32"))


def _modulo(build: Build, node: Node) -> Any:
    import paddle

    first, second = _operands(build, node)
    if not node.attrs.get("fmod", 0):
        return paddle.remainder(first, second)  # the sign of the divisor, as ONNX has it
    if dtype_of(first) != "float32":
        raise CannotImport("fmod of integers, expected floats")
    quotient = paddle.trunc(paddle.divide(first, second))
    return paddle.subtract(first, paddle.multiply(quotient, second))


def _each(combine: str) -> Rule:
    """Return the rule of an op with any number of operands."""

    def rule(build: Build, node: Node) -> Any:
        import paddle

        operands = _operands(build, node)
        result = operands[0]
        for operand in operands[1:]:
            result = getattr(paddle, combine)(result, operand)
        if node.type == "Mean" and len(operands) > 1:
            result = paddle.scale(result, scale=1 / len(operands))
        return result if len(operands) > 1 else paddle.assign(result)

    return rule


def _two(function: str) -> Rule:
    def rule(build: Build, node: Node) -> Any:
        import paddle

        return getattr(paddle, function)(*_operands(build, node))

    return rule


def _one(function: str) -> Rule:
    def rule(build: Build, node: Node) -> Any:
        import paddle

        return getattr(paddle, function)(build.value(node.inputs[0]))

    return rule


def _negate(build: Build, node: Node) -> Any:
    import paddle

    return paddle.scale(build.value(node.inputs[0]), scale=-1.0)


def _round(build: Build, node: Node) -> Any:
    """Round halves to the even neighbour; Paddle's own round moves them away from zero."""
    import paddle

    value = build.value(node.inputs[0])
    rounded = paddle.floor(paddle.scale(value, scale=1.0, bias=0.5))
    half = paddle.equal(paddle.subtract(rounded, value), paddle.full([1], 0.5, "float32"))
    odd = paddle.remainder(rounded, paddle.full([1], 2.0, "float32"))
    return paddle.subtract(rounded, paddle.multiply(paddle.cast(half, "float32"), odd))


def _same(build: Build, node: Node) -> Any:
    build.refuse_outputs(node, 1)
    return build.value(node.inputs[0])


def _clip(build: Build, node: Node) -> Any:
    import paddle

    limits: list[float | None] = []
    for index, name in ((1, "min"), (2, "max")):
        if name in node.attrs:
            limits.append(float(node.attrs[name]))
        elif node.has(index):
            limits.append(float(build.constant(node.inputs[index], name).reshape(()).item()))
        else:
            limits.append(None)
    value = build.value(node.inputs[0])
    if limits == [None, None]:
        return value
    if "int" in dtype_of(value):
        bounds = [None if each is None else int(each) for each in limits]
        return paddle.clip(value, *bounds)
    return paddle.clip(value, *limits)


def _cast(build: Build, node: Node) -> Any:
    import paddle

    target = DTYPES.get(int(node.attrs.get("to", 0)))
    if target is None:
        raise CannotImport(f"it casts to the element type {node.attrs.get('to')}, which has no counterpart")
    return _to(paddle, build.value(node.inputs[0]), target)


def _cast_like(build: Build, node: Node) -> Any:
    import paddle

    return _to(paddle, build.value(node.inputs[0]), build.dtype(node.inputs[1]))


def _to(paddle: Any, value: Any, target: str) -> Any:
    return value if dtype_of(value) == target else paddle.cast(value, target)


def _where(build: Build, node: Node) -> Any:
    import paddle

    operands = build.values(node)
    if build.shapes is None:
        full = list(np.broadcast_shapes(*(build.shape(name) for name in node.inputs)))
        operands = [each if list(each.shape) == full else paddle.expand(each, full) for each in operands]
    return paddle.where(*operands)


_SPECIAL: dict[str, Callable[[Build, Node], Any]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Pow": _power,
    "Mod": _modulo,
    "Sum": _each("add"),
    "Mean": _each("add"),
    "Max": _each("maximum"),
    "Min": _each("minimum"),
    "Neg": _negate,
    "Round": _round,
    "Identity": _same,
    "Dropout": _same,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Where": _where,
}
RULES: dict[str, Rule] = {
    **{name: _two(function) for name, function in _TWO_OPERANDS.items()},
    **{name: _one(function) for name, function in _ONE_OPERAND.items()},
    **_SPECIAL,
}
