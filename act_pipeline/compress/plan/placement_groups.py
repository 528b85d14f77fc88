"""Groups of ops whose precision is decided together: of one kind, in one part of the model, at one resolution.

Runtimes compute such ops by the same kernels on tensors of like sizes, so that they gain or lose from INT8 alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

from act_pipeline.compress.plan.placement import OpGroup
from act_pipeline.graph.op_types import CONVOLUTIONS, QUANTIZABLE_OPS
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph


def group_ops(graph: StaticGraph, ops: Collection[QuantizableOp]) -> list[OpGroup]:
    """Group the ops of a float model, in the order of the program.

    Args:
        graph: the float model that ``ops`` are of.
        ops: the ops that are in INT8.
    """
    block = graph.program.global_block()
    outputs = {op.output_arg_names[0]: op for op in block.ops if op.output_arg_names}
    found: dict[str, list[str]] = {}
    for op in ops:
        found.setdefault(f"{op.group}, {_kind(block, op, outputs[op.name])}", []).append(op.name)
    return [OpGroup(name, tuple(names)) for name, names in found.items()]


def structure_hash(graph: StaticGraph, groups: Collection[OpGroup]) -> str:
    """Return a hash of all that the speed of a model depends on: its ops and shapes, and what is in INT8; no weights.

    Args:
        graph: the float model.
        groups: the groups of ops in INT8.
    """
    block = graph.program.global_block()
    ops = [
        (op.type, sorted(op.input_arg_names), [(name, _shape(block, name)) for name in op.output_arg_names])
        for op in block.ops
        if op.type not in ("feed", "fetch")
    ]
    weights = sorted((name, _shape(block, name)) for name in block.vars if graph.is_parameter(name))
    described = json.dumps([ops, weights, [(group.name, group.ops) for group in groups]])
    return hashlib.sha256(described.encode()).hexdigest()


def _kind(block: Any, op: QuantizableOp, raw: Any) -> str:
    if op.type in CONVOLUTIONS:
        kernel = "x".join(map(str, block.var(raw.input("Filter")[0]).shape[2:]))
        size = "x".join(str(edge) if edge > 0 else "?" for edge in _shape(block, op.name)[2:])
        channels = block.var(raw.input("Filter")[0]).shape[1] * int(raw.attr("groups"))
        depthwise = "depthwise " if int(raw.attr("groups")) == channels and channels > 1 else ""
        return f"{depthwise}{kernel} convolutions, {size}"
    if op.type in QUANTIZABLE_OPS:
        return "matmuls with weights" if op.weight is not None else "matmuls of two activations"
    return op.type


def _shape(block: Any, name: str) -> list[int]:
    return [int(size) for size in block.var(name).shape] if block.has_var(name) else []
