"""Ops that compute a box side as the mean of a distribution over distances, which INT8 distorts.

YOLOv6, v8 and v11, PP-YOLOE and D-FINE predict a distribution over n distances for each side of a box, and multiply it
by the row of the distances (Generalized Focal Loss, Li et al. 2020, "DFL"). In INT8 the distances themselves are
rounded, by up to 0.06 of a cell with n = 16, which moves every box.
"""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import RESHAPING
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph

REASON = "mean of a distribution over box distances (DFL)"


def box_expectations(graph: StaticGraph, ops: Sequence[QuantizableOp]) -> dict[str, str]:
    """Return the ops that compute the mean of a distribution: one output channel, and the output of a softmax as input.

    Args:
        graph: a float graph.
        ops: its quantizable ops.

    Returns:
        Name of the op -> :data:`REASON`.
    """
    block = graph.program.global_block()
    index = GraphIndex(block.ops)
    found = {}
    for op in ops:
        if op.weight is None or tuple(block.var(op.weight).shape)[op.weight_axis] != 1:
            continue
        if reads_distribution(index, op.activations[0]):
            found[op.name] = REASON
    return found


def reads_distribution(index: GraphIndex, name: str) -> bool:
    """Return whether a tensor is the output of a softmax, possibly reshaped.

    Args:
        index: the ops of the graph.
        name: the tensor.
    """
    while name in index.producer and index.producer[name].type in RESHAPING:
        name = index.producer[name].input("X")[0]
    return name in index.producer and index.producer[name].type == "softmax"
