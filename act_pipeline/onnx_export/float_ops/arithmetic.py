"""Export rules of elementwise arithmetic: binary and unary ops, comparisons, logic, scaling and clipping."""

from __future__ import annotations

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, refuse
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

_UNARY = {
    "abs": "Abs",
    "atan": "Atan",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "isinf_v2": "IsInf",
    "isnan_v2": "IsNaN",
    "log": "Log",
    "reciprocal": "Reciprocal",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tan": "Tan",
}
_BINARY = {
    "elementwise_add": "Add",
    "elementwise_sub": "Sub",
    "minus": "Sub",
    "elementwise_mul": "Mul",
    "elementwise_div": "Div",
    "elementwise_max": "Max",
    "elementwise_min": "Min",
    "elementwise_pow": "Pow",
    "greater_than": "Greater",
    "greater_equal": "GreaterOrEqual",
    "less_than": "Less",
    "less_equal": "LessOrEqual",
    "equal": "Equal",
}
_LOGICAL = {
    "logical_and": "And",
    "logical_or": "Or",
    "logical_xor": "Xor",
    "bitwise_and": "And",
    "bitwise_or": "Or",
    "bitwise_xor": "Xor",
}


def _trailing(build: GraphBuilder, op: Op) -> int:
    """Return how many axes to append to the second operand, because ONNX, like NumPy, aligns the last axes."""
    axis, ranks = int(op.attrs.get("axis", -1)), [len(build.shapes[op.input(slot)]) for slot in ("X", "Y")]
    return max(ranks[0] - axis - ranks[1], 0) if axis >= 0 and ranks[1] > 0 else 0


def _operands(build: GraphBuilder, op: Op) -> list[str]:
    """Return the ONNX names of both operands, which broadcast by NumPy's rules and have the type of the first."""
    left, right, trailing = op.input("X"), op.input("Y"), _trailing(build, op)
    operand = build.get(right)
    if trailing:
        if right in build.constants:
            value = build.constants[right]
            operand = build.initializer(value.reshape(value.shape + (1,) * trailing), right)
        else:
            rank = len(build.shapes[right])
            operand = build.node("Unsqueeze", [operand, build.ints(*range(rank, rank + trailing))])
    types = [build.dtypes.get(name, np.float32) for name in (left, right)]
    if types[0] != types[1]:
        operand = build.cast(operand, types[0])
    return [build.get(left), operand]


def _binary(build: GraphBuilder, op: Op) -> str:
    return build.node(_BINARY[op.type], _operands(build, op), op.output)


def _maximum_of_numbers(build: GraphBuilder, op: Op) -> str:
    """Add a Max that is the other operand where one is NaN; ONNX's is NaN."""
    left, right = _operands(build, op)
    numbers = [
        build.node("Where", [build.node("IsNaN", [value]), other, value])
        for value, other in ((left, right), (right, left))
    ]
    return build.node("Max", numbers, op.output)


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


def _modulo(build: GraphBuilder, op: Op) -> str:
    """Add Paddle's remainder, which has the sign of the divisor; ONNX's does for integers only."""
    left, right = _operands(build, op)
    if np.issubdtype(build.dtypes.get(op.input("X"), np.float32), np.integer):
        return build.node("Mod", [left, right], op.output)
    rest, zero = build.node("Mod", [left, right], fmod=1), build.scalar(0, op.input("X"))
    signs = [build.node("Less", [value, zero]) for value in (rest, right)]
    other = build.node("And", [build.node("Xor", signs), build.node("Not", [build.node("Equal", [rest, zero])])])
    return build.node("Where", [other, build.node("Add", [rest, right]), rest], op.output)


def _floor_divide(build: GraphBuilder, op: Op) -> str:
    left, right = _operands(build, op)
    if not np.issubdtype(build.dtypes.get(op.input("X"), np.float32), np.integer):
        return build.node("Floor", [build.node("Div", [left, right])], op.output)
    # ONNX's division of integers truncates. Without the remainder, nothing is left to truncate.
    whole = build.node("Sub", [left, build.node("Mod", [left, right])])
    return build.node("Div", [whole, right], op.output)


def _not_equal(build: GraphBuilder, op: Op) -> str:
    return build.node("Not", [build.node("Equal", _operands(build, op))], op.output)


def _logical(build: GraphBuilder, op: Op) -> str:
    names = [op.input("X"), *op.inputs.get("Y", ())]
    operands = [build.get(op.input("X"))] if len(names) == 1 else _operands(build, op)
    for index, name in enumerate(names):
        if build.dtypes.get(names[0] if op.type.startswith("bitwise") else name) != np.bool_:
            if op.type.startswith("bitwise"):
                raise CannotLower("its operands are not boolean")
            operands[index] = build.cast(build.get(name), np.bool_)
    return build.node(_LOGICAL.get(op.type, "Not"), operands, op.output)


def _unary(build: GraphBuilder, op: Op) -> str:
    return build.node(_UNARY[op.type], [build.get(op.input("X"))], op.output)


def _round(build: GraphBuilder, op: Op) -> str:
    """Add Paddle's rounding, half away from zero; ONNX's Round is half to even."""
    value = build.get(op.input("X"))
    raised = build.node("Add", [build.node("Abs", [value]), build.scalar(0.5, op.input("X"))])
    return build.node("Mul", [build.node("Sign", [value]), build.node("Floor", [raised])], op.output)


def _rsqrt(build: GraphBuilder, op: Op) -> str:
    return build.node("Reciprocal", [build.node("Sqrt", [build.get(op.input("X"))])], op.output)


def _square(build: GraphBuilder, op: Op) -> str:
    value = build.get(op.input("X"))
    return build.node("Mul", [value, value], op.output)


def _log_plus_one(build: GraphBuilder, op: Op) -> str:
    raised = build.node("Add", [build.get(op.input("X")), build.scalar(1, op.input("X"))])
    return build.node("Log", [raised], op.output)


def _log2(build: GraphBuilder, op: Op) -> str:
    value = build.node("Log", [build.get(op.input("X"))])
    return build.node("Mul", [value, build.scalar(1 / np.log(2), op.input("X"))], op.output)


def _power(build: GraphBuilder, op: Op) -> str:
    refuse(op, "FactorTensor")
    name = op.input("X")
    return build.node("Pow", [build.get(name), build.scalar(float(op.attrs["factor"]), name)], op.output)


def _sum(build: GraphBuilder, op: Op) -> str:
    made = build.get(op.inputs["X"][0])
    for name in op.inputs["X"][1:]:
        made = build.node("Add", [made, build.get(name)], op.output)
    return made


def _increment(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    return build.node("Add", [build.get(name), build.scalar(op.attrs.get("step", 1.0), name)], op.output)


def _scale(build: GraphBuilder, op: Op) -> str:
    refuse(op, "ScaleTensor")
    name = op.input("X")
    value, factor, bias = build.get(name), float(op.attrs["scale"]), float(op.attrs.get("bias", 0.0))
    if factor == 1 and bias == 0:
        return value

    def step(kind: str, value: str, number: float) -> str:
        neutral = 1 if kind == "Mul" else 0
        return value if number == neutral else build.node(kind, [value, build.scalar(number, name)], op.output)

    if op.attrs.get("bias_after_scale", True):
        return step("Add", step("Mul", value, factor), bias)
    return step("Mul", step("Add", value, bias), factor)


def _clip(build: GraphBuilder, op: Op) -> str:
    name = op.input("X")
    bounds = []
    for slot in ("Min", "Max"):
        if slot in op.inputs:
            bounds.append(build.reshape(build.get(op.input(slot))))
        else:
            bounds.append(build.scalar(op.attrs[slot.lower()], name))
    return build.node("Clip", [build.get(name), *bounds], op.output)


RULES: dict[str, Rule] = {
    **{kind: _unary for kind in _UNARY},
    **{kind: _binary for kind in _BINARY},
    **{kind: _logical for kind in (*_LOGICAL, "logical_not", "bitwise_not")},
    "elementwise_fmax": _maximum_of_numbers,
    "elementwise_mul": _multiply,
    "elementwise_mod": _modulo,
    "elementwise_floordiv": _floor_divide,
    "not_equal": _not_equal,
    "round": _round,
    "rsqrt": _rsqrt,
    "square": _square,
    "log1p": _log_plus_one,
    "log2": _log2,
    "pow": _power,
    "sum": _sum,
    "increment": _increment,
    "scale": _scale,
    "clip": _clip,
}
