"""Export rules of ops that compute no values: they move or select elements, return shapes, or create constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, element_type, refuse
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

_INT64_MIN = -(2**63)


def _shape_operand(build: GraphBuilder, names: list[str]) -> str:
    """Return an int64 vector of the values that Paddle passes as several tensors of one element each."""
    parts = []
    for name in names:
        if name in build.constants:
            parts.append(build.initializer(build.constants[name].astype(np.int64).reshape(-1)))
        else:
            flat = build.node("Reshape", [build.get(name), build.ints(-1)])
            parts.append(build.node("Cast", [flat], to=build.onnx.TensorProto.INT64))
    return parts[0] if len(parts) == 1 else build.node("Concat", parts, axis=0)


def _reshape(build: GraphBuilder, op: Op) -> str:
    refuse(op, "Shape")
    result = [int(size) for size in build.shapes[op.output]]
    given = [int(size) for size in op.attrs.get("shape") or result]
    for sizes in (given, result):
        if sizes.count(-1) <= 1 and not (sizes is result and 0 in sizes):
            return build.node("Reshape", [build.get(op.input("X")), build.ints(*sizes)], op.output)
    if "ShapeTensor" in op.inputs:
        target = _shape_operand(build, op.inputs["ShapeTensor"])
        return build.node("Reshape", [build.get(op.input("X")), target], op.output)
    raise CannotLower(f"its shape {given} leaves more than one size open")


def _flatten(build: GraphBuilder, op: Op) -> str:
    return _reshape(build, Op(op.type, op.inputs, op.outputs, {"shape": list(build.shapes[op.output])}))


def _transpose(build: GraphBuilder, op: Op) -> str:
    return build.node("Transpose", [build.get(op.input("X"))], op.output, perm=[int(axis) for axis in op.attrs["axis"]])


def _unsqueeze(build: GraphBuilder, op: Op) -> str:
    refuse(op, "AxesTensor", "AxesTensorList")
    kind = "Unsqueeze" if op.type == "unsqueeze2" else "Squeeze"
    return build.node(kind, [build.get(op.input("X")), build.ints(*op.attrs["axes"])], op.output)


def _concat(build: GraphBuilder, op: Op) -> str:
    refuse(op, "AxisTensor")
    return build.node("Concat", [build.get(name) for name in op.inputs["X"]], op.output, axis=int(op.attrs["axis"]))


def _stack(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["axis"])
    parts = [build.node("Unsqueeze", [build.get(name), build.ints(axis)]) for name in op.inputs["X"]]
    return build.node("Concat", parts, op.output, axis=axis)


def _split(build: GraphBuilder, op: Op) -> None:
    refuse(op, "AxisTensor", "SectionsTensorList")
    axis, names = int(op.attrs["axis"]), op.outputs["Out"]
    sizes = [int(build.shapes[name][axis]) for name in names]
    if min(sizes) < 0:
        raise CannotLower("the sizes of its parts are open")
    made = build.node("Split", [build.get(op.input("X")), build.ints(*sizes)], op.output, len(names), axis=axis)
    build.values.update(zip(names, made if len(names) > 1 else [made]))


def _slice(build: GraphBuilder, op: Op) -> str | None:
    refuse(op, "StartsTensor", "EndsTensor", "StartsTensorList", "EndsTensorList")
    axes, starts, ends = ([int(number) for number in op.attrs[key]] for key in ("axes", "starts", "ends"))
    dropped = [int(axis) for axis in op.attrs.get("decrease_axis") or ()]
    name = op.input("Input")
    if name in build.constants:  # q, k and v are slices of one weight; as constants they can be stored as integers
        value = build.constants[name]
        for axis, start, end in zip(axes, starts, ends):
            value = value[(slice(None),) * axis + (slice(start, end),)]
        build.constants[op.output] = value.reshape(
            [size for axis, size in enumerate(value.shape) if axis not in dropped]
        )
        return None
    inputs = [build.get(name), build.ints(*starts), build.ints(*ends), build.ints(*axes)]
    made = build.node("Slice", inputs, op.output)
    return build.node("Squeeze", [made, build.ints(*dropped)], op.output) if dropped else made


def _flip(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["axis"]]
    count = len(axes)
    bounds = [build.ints(*[number] * count) for number in (-1, _INT64_MIN)]
    inputs = [build.get(op.input("X")), *bounds, build.ints(*axes), build.ints(*[-1] * count)]
    return build.node("Slice", inputs, op.output)


def _tile(build: GraphBuilder, op: Op) -> str:
    refuse(op, "RepeatTimes")
    if "repeat_times_tensor" in op.inputs:
        repeats, count = _shape_operand(build, op.inputs["repeat_times_tensor"]), len(op.inputs["repeat_times_tensor"])
    else:
        repeats, count = build.ints(*op.attrs["repeat_times"]), len(op.attrs["repeat_times"])
    value, missing = build.get(op.input("X")), count - len(build.shapes[op.input("X")])
    if missing > 0:
        value = build.node("Unsqueeze", [value, build.ints(*range(missing))])
    return build.node("Tile", [value, repeats], op.output)


def _gather_nd(build: GraphBuilder, op: Op) -> str:
    index = build.node("Cast", [build.get(op.input("Index"))], to=build.onnx.TensorProto.INT64)
    return build.node("GatherND", [build.get(op.input("X")), index], op.output)


def _top_k(build: GraphBuilder, op: Op) -> None:
    refuse(op, "K")
    values, indices = build.node(
        "TopK", [build.get(op.input("X")), build.ints(op.attrs["k"])], op.output, 2,
        axis=int(op.attrs["axis"]), largest=int(op.attrs["largest"]), sorted=int(op.attrs["sorted"]),
    )  # fmt: skip
    build.values[op.outputs["Out"][0]] = values
    build.values[op.outputs["Indices"][0]] = indices


def _where(build: GraphBuilder, op: Op) -> str:
    return build.node("Where", [build.get(op.input(slot)) for slot in ("Condition", "X", "Y")], op.output)


def _cast(build: GraphBuilder, op: Op) -> str | None:
    dtype = element_type(op, "out_dtype")
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")].astype(dtype)
        return None
    to = build.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return build.node("Cast", [build.get(op.input("X"))], op.output, to=to)


def _shape(build: GraphBuilder, op: Op) -> str:
    made = build.node("Shape", [build.get(op.input("Input"))])
    return build.node("Cast", [made], op.output, to=build.onnx.TensorProto.INT32)


def _range(build: GraphBuilder, op: Op) -> str:
    scalars = [build.node("Reshape", [build.get(op.input(slot)), build.initializer(np.zeros(0, np.int64))])
               for slot in ("Start", "End", "Step")]  # fmt: skip
    return build.node("Range", scalars, op.output)


def _fill_constant(build: GraphBuilder, op: Op) -> None:
    refuse(op, "ValueTensor", "ShapeTensor", "ShapeTensorList")
    text = op.attrs.get("str_value") or ""
    number = float(text) if text else op.attrs["value"]
    build.constants[op.output] = np.full([int(size) for size in op.attrs["shape"]], number, element_type(op))


def _assign_value(build: GraphBuilder, op: Op) -> None:
    values: Sequence[Any] = next((op.attrs[key] for key in ("fp32_values", "int64_values", "int32_values",
                                  "bool_values", "fp64_values", "values") if op.attrs.get(key)), [])  # fmt: skip
    build.constants[op.output] = np.array(values, element_type(op)).reshape([int(size) for size in op.attrs["shape"]])


def _fill_any_like(build: GraphBuilder, op: Op) -> str:
    dtype = element_type(op) if int(op.attrs.get("dtype", -1)) >= 0 else np.float32
    value = build.onnx.numpy_helper.from_array(np.array([op.attrs["value"]], dtype))
    return build.node("ConstantOfShape", [build.node("Shape", [build.get(op.input("X"))])], op.output, value=value)


def _alias(build: GraphBuilder, op: Op) -> str | None:
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")]
        return None
    return build.get(op.input("X"))


RULES: dict[str, Rule] = {
    "reshape2": _reshape,
    "flatten_contiguous_range": _flatten,
    "transpose2": _transpose,
    "unsqueeze2": _unsqueeze,
    "squeeze2": _unsqueeze,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "slice": _slice,
    "flip": _flip,
    "tile": _tile,
    "cast": _cast,
    "where": _where,
    "shape": _shape,
    "range": _range,
    "fill_constant": _fill_constant,
    "assign_value": _assign_value,
    "fill_any_like": _fill_any_like,
    "assign": _alias,
    "share_data": _alias,
    "gather_nd": _gather_nd,
    "top_k_v2": _top_k,
}
