"""Export rules of ops that create tensors, return shapes, or convert types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import Rule, element_type, fixed_shape, known_integers, vector
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op


def _cast(build: GraphBuilder, op: Op) -> str | None:
    dtype = element_type(op, "out_dtype")
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")].astype(dtype)
        return None
    return build.cast(build.get(op.input("X")), dtype, op.output)


def _shape(build: GraphBuilder, op: Op) -> str:
    return build.cast(build.node("Shape", [build.get(op.input("Input"))]), np.int32, op.output)


def _size(build: GraphBuilder, op: Op) -> str:
    return build.node("Size", [build.get(op.input("Input"))], op.output)


def _range(build: GraphBuilder, op: Op) -> str | None:
    names = [op.input(slot) for slot in ("Start", "End", "Step")]
    if all(name in build.constants for name in names):
        start, end, step = (build.constants[name].reshape(-1)[0] for name in names)
        build.constants[op.output] = np.arange(start, end, step, dtype=build.dtypes.get(op.output, np.int64))
        return None
    return build.node("Range", [build.reshape(build.get(name)) for name in names], op.output)


def _number(op: Op, dtype: type) -> np.ndarray:
    """Return the value of a filling op as a 0-dimensional array; the text holds more digits than the attribute."""
    text = str(op.attrs.get("str_value") or "")
    if not text:
        return np.array(op.attrs["value"]).astype(dtype)
    whole = np.issubdtype(dtype, np.integer) and text.lstrip("-").isdigit()
    return np.array(int(text) if whole else float(text)).astype(dtype)


def _filled(build: GraphBuilder, shape: str, number: np.ndarray, hint: str) -> str:
    value = build.onnx.numpy_helper.from_array(number.reshape(1))
    return build.node("ConstantOfShape", [shape], hint, value=value)


def _fill_constant(build: GraphBuilder, op: Op) -> str | None:
    dtype = element_type(op)
    names = op.inputs.get("ShapeTensor") or op.inputs.get("ShapeTensorList") or []
    sizes = known_integers(build, names) if names else [int(size) for size in op.attrs["shape"]]
    if "ValueTensor" in op.inputs:
        shape = vector(build, names) if sizes is None else build.ints(*sizes)
        return build.node("Expand", [build.reshape(build.get(op.input("ValueTensor"))), shape], op.output)
    number = _number(op, dtype)
    if sizes is None:
        return _filled(build, vector(build, names), number, op.output)
    build.constants[op.output] = np.full(sizes, number, dtype)
    return None


def _fill_like_batch(build: GraphBuilder, op: Op) -> str | None:
    """Fill a shape of which one size is that of an axis of another tensor."""
    sizes, dtype = [int(size) for size in op.attrs["shape"]], element_type(op)
    source, target = int(op.attrs.get("input_dim_idx", 0)), int(op.attrs.get("output_dim_idx", 0))
    size, number = int(build.shapes[op.input("Input")][source]), _number(op, dtype)
    if size >= 0:
        sizes[target] = size
        build.constants[op.output] = np.full(sizes, number, dtype)
        return None
    shape = build.node("Shape", [build.get(op.input("Input"))])
    parts = [build.node("Gather", [shape, build.ints(source)])]
    if target > 0:
        parts.insert(0, build.ints(*sizes[:target]))
    if target < len(sizes) - 1:
        parts.append(build.ints(*sizes[target + 1 :]))
    return _filled(build, build.node("Concat", parts, axis=0), number, op.output)


def _fill_like(build: GraphBuilder, op: Op) -> str:
    given = int(op.attrs.get("dtype", -1))
    dtype = element_type(op) if given >= 0 else build.dtypes.get(op.input("X"), np.float32)
    shape = build.node("Shape", [build.get(op.input("X"))])
    return _filled(build, shape, np.array(op.attrs["value"]).astype(dtype), op.output)


def _assign_value(build: GraphBuilder, op: Op) -> None:
    values: Sequence[Any] = next((op.attrs[key] for key in ("fp32_values", "int64_values", "int32_values",
                                  "bool_values", "fp64_values", "values") if op.attrs.get(key)), [])  # fmt: skip
    build.constants[op.output] = np.array(values, element_type(op)).reshape([int(size) for size in op.attrs["shape"]])


def _eye(build: GraphBuilder, op: Op) -> None:
    rows, columns = int(op.attrs["num_rows"]), int(op.attrs.get("num_columns", -1))
    build.constants[op.output] = np.eye(rows, columns if columns >= 0 else rows, dtype=element_type(op))


def _linspace(build: GraphBuilder, op: Op) -> None:
    start, stop, count = (build.constants[op.input(slot)].reshape(-1)[0] for slot in ("Start", "Stop", "Num"))
    build.constants[op.output] = np.linspace(start, stop, int(count)).astype(element_type(op))


def _meshgrid(build: GraphBuilder, op: Op) -> None:
    names = op.inputs["X"]
    sizes = [fixed_shape(build, name)[0] for name in names]
    for axis, (name, output) in enumerate(zip(names, op.outputs["Out"])):
        along = build.reshape(build.get(name), *[-1 if other == axis else 1 for other in range(len(names))])
        build.values[output] = build.node("Expand", [along, build.ints(*sizes)], output)


def _alias(build: GraphBuilder, op: Op) -> str | None:
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")]
        return None
    return build.get(op.input("X"))


RULES: dict[str, Rule] = {
    "cast": _cast,
    "shape": _shape,
    "size": _size,
    "range": _range,
    "fill_constant": _fill_constant,
    "fill_constant_batch_size_like": _fill_like_batch,
    "fill_any_like": _fill_like,
    "assign_value": _assign_value,
    "eye": _eye,
    "linspace": _linspace,
    "meshgrid": _meshgrid,
    "assign": _alias,
    "share_data": _alias,
}
