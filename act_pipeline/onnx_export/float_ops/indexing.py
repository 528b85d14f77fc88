"""Export rules of ops that read or write elements by indices or conditions."""

from __future__ import annotations

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, known_integers, vector
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op


def _gather(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs.get("axis", 0))
    if "Axis" in op.inputs:
        known = known_integers(build, op.inputs["Axis"])
        if known is None:
            raise CannotLower("its Axis is computed at run time")
        axis = known[0]
    ranks = [len(build.shapes[op.input(slot)]) for slot in ("X", "Index")]
    index = build.get(op.input("Index"))
    if ranks[0] - 1 + ranks[1] != len(build.shapes[op.output]):  # Paddle reads [K, 1] as [K]
        index = build.reshape(index, -1)
    return build.node("Gather", [build.get(op.input("X")), index], op.output, axis=axis)


def _index_select(build: GraphBuilder, op: Op) -> str:
    inputs = [build.get(op.input("X")), build.get(op.input("Index"))]
    return build.node("Gather", inputs, op.output, axis=int(op.attrs.get("dim", 0)))


def _index_sample(build: GraphBuilder, op: Op) -> str:
    return build.node("GatherElements", [build.get(op.input("X")), build.get(op.input("Index"))], op.output, axis=1)


def _take_along(build: GraphBuilder, op: Op) -> str:
    inputs = [build.get(op.input("Input")), build.get(op.input("Index"))]
    return build.node("GatherElements", inputs, op.output, axis=int(op.attrs.get("Axis", 0)))


def _put_along(build: GraphBuilder, op: Op) -> str:
    reduction = str(op.attrs.get("Reduce", "assign"))
    known = {"assign": "none", "add": "add", "mul": "mul", "multiply": "mul"}
    if reduction not in known or not op.attrs.get("Include_self", True):
        raise CannotLower(f"its reduction {reduction} is not known")
    inputs = [build.get(op.input(slot)) for slot in ("Input", "Index", "Value")]
    return build.node(
        "ScatterElements", inputs, op.output, axis=int(op.attrs.get("Axis", 0)), reduction=known[reduction]
    )


def _int64(build: GraphBuilder, name: str) -> str:
    value = build.get(name)
    return value if build.dtypes.get(name) == np.int64 else build.cast(value, np.int64)


def _gather_nd(build: GraphBuilder, op: Op) -> str:
    return build.node("GatherND", [build.get(op.input("X")), _int64(build, op.input("Index"))], op.output)


def _scatter(build: GraphBuilder, op: Op) -> str:
    """Write rows; where they are added, the rows that the indices name begin at zero, as Paddle defines it."""
    name, updates = op.input("X"), build.get(op.input("Updates"))
    rows = build.reshape(_int64(build, op.input("Ids")), -1, 1)
    value = build.get(name)
    if op.attrs.get("overwrite", True):
        return build.node("ScatterND", [value, rows, updates], op.output)
    zeros = build.node("Expand", [build.scalar(0, name), build.node("Shape", [updates])])
    cleared = build.node("ScatterND", [value, rows, zeros])
    return build.node("ScatterND", [cleared, rows, updates], op.output, reduction="add")


def _scatter_nd_add(build: GraphBuilder, op: Op) -> str:
    inputs = [build.get(op.input("X")), _int64(build, op.input("Index")), build.get(op.input("Updates"))]
    return build.node("ScatterND", inputs, op.output, reduction="add")


def _one_hot(build: GraphBuilder, op: Op) -> str:
    if "depth_tensor" in op.inputs:
        depth = build.reshape(vector(build, op.inputs["depth_tensor"]))
    else:
        depth = build.initializer(np.array(op.attrs["depth"], np.int64))
    values = build.initializer(np.array([0, 1], build.dtypes.get(op.output, np.float32)))
    return build.node("OneHot", [_int64(build, op.input("X")), depth, values], op.output, axis=-1)


def _embedding(build: GraphBuilder, op: Op) -> str:
    name, row = op.input("W"), int(op.attrs.get("padding_idx", -1))
    rows = build.get(name)
    if row >= 0:
        value = build.constants[name].copy()
        value[row] = 0
        rows = build.initializer(value, name)
    return build.node("Gather", [rows, build.get(op.input("Ids"))], op.output)


def _where(build: GraphBuilder, op: Op) -> str:
    return build.node("Where", [build.get(op.input(slot)) for slot in ("Condition", "X", "Y")], op.output)


def _where_index(build: GraphBuilder, op: Op) -> str:
    found = build.node("NonZero", [build.get(op.input("Condition"))])
    return build.node("Transpose", [found], op.output, perm=[1, 0])


RULES: dict[str, Rule] = {
    "gather": _gather,
    "gather_nd": _gather_nd,
    "index_select": _index_select,
    "index_sample": _index_sample,
    "take_along_axis": _take_along,
    "put_along_axis": _put_along,
    "scatter": _scatter,
    "scatter_nd_add": _scatter_nd_add,
    "one_hot_v2": _one_hot,
    "lookup_table_v2": _embedding,
    "where": _where,
    "where_index": _where_index,
}
