"""Export rules of ops along axes: reductions, largest elements, sorting, cumulative sums."""

from __future__ import annotations

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import Rule, fixed_shape, vector
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

_REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_mean": "ReduceMean",
    "reduce_prod": "ReduceProd",
    "mean": "ReduceMean",
}
_OF_BOOLEANS = {"reduce_all": "ReduceMin", "reduce_any": "ReduceMax"}


def _axes(build: GraphBuilder, op: Op) -> list[int]:
    dims = op.attrs.get("dim")
    axes = [int(axis) for axis in (dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims])]
    if op.attrs.get("reduce_all") or not axes:
        axes = list(range(len(build.shapes[op.input("X")])))
    return axes


def _reduce(build: GraphBuilder, op: Op) -> str:
    name, axes = op.input("X"), _axes(build, op)
    value, dtype = build.get(name), build.dtypes.get(op.output)
    if dtype is not None and dtype != build.dtypes.get(name, np.float32):  # the sum of booleans is an integer
        value = build.cast(value, dtype)
    return build.reduce(_REDUCTIONS[op.type], value, axes, bool(op.attrs.get("keep_dim")), op.output)


def _reduce_booleans(build: GraphBuilder, op: Op) -> str:
    value = build.cast(build.get(op.input("X")), np.int32)
    made = build.reduce(_OF_BOOLEANS[op.type], value, _axes(build, op), bool(op.attrs.get("keep_dim")))
    return build.cast(made, np.bool_, op.output)


def _arg(build: GraphBuilder, op: Op) -> str:
    name, axis, keep = op.input("X"), int(op.attrs.get("axis", -1)), bool(op.attrs.get("keepdims"))
    value, flat = build.get(name), bool(op.attrs.get("flatten"))
    if flat:
        value, axis = build.reshape(value, -1), 0
    kind = "ArgMax" if op.type == "arg_max" else "ArgMin"
    made = build.node(kind, [value], op.output, axis=axis, keepdims=int(keep and not flat))
    if flat and keep:
        made = build.reshape(made, *[1] * len(build.shapes[name]))
    elif flat:
        made = build.reshape(made)
    dtype = build.dtypes.get(op.output, np.int64)
    return made if dtype == np.int64 else build.cast(made, dtype, op.output)


def _top_k(build: GraphBuilder, op: Op) -> None:
    count = vector(build, op.inputs["K"]) if "K" in op.inputs else build.ints(op.attrs["k"])
    values, indices = build.node(
        "TopK", [build.get(op.input("X")), count], op.output, 2,
        axis=int(op.attrs.get("axis", -1)), largest=int(op.attrs.get("largest", True)),
        sorted=int(op.attrs.get("sorted", True)),
    )  # fmt: skip
    build.values[op.outputs["Out"][0]] = values
    build.values[op.outputs["Indices"][0]] = indices


def _sort(build: GraphBuilder, op: Op) -> None:
    name, axis = op.input("X"), int(op.attrs.get("axis", -1))
    count = fixed_shape(build, name, axis % len(build.shapes[name]))[0]
    attrs = {"k": count, "axis": axis, "largest": bool(op.attrs.get("descending")), "sorted": True}
    _top_k(build, Op("top_k_v2", op.inputs, op.outputs, attrs))


def _cumulate(build: GraphBuilder, op: Op) -> str:
    value, axis = build.get(op.input("X")), int(op.attrs.get("axis", -1))
    if op.attrs.get("flatten"):
        value, axis = build.reshape(value, -1), 0
    return build.node(
        "CumSum", [value, build.initializer(np.array(axis, np.int64))], op.output,
        exclusive=int(bool(op.attrs.get("exclusive"))), reverse=int(bool(op.attrs.get("reverse"))),
    )  # fmt: skip


RULES: dict[str, Rule] = {
    **{kind: _reduce for kind in _REDUCTIONS},
    **{kind: _reduce_booleans for kind in _OF_BOOLEANS},
    "arg_max": _arg,
    "arg_min": _arg,
    "top_k_v2": _top_k,
    "top_k": _top_k,
    "argsort": _sort,
    "cumsum": _cumulate,
}
