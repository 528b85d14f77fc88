"""Ops that stay float unless the user names them, since INT8 distorts them or a runtime refuses it.

- The mean of a distribution. YOLOv6, v8 and v11, PP-YOLOE and D-FINE predict a distribution over n distances for each
  side of a box, and multiply it by the row of the distances (Generalized Focal Loss, Li et al. 2020, "DFL"). In INT8
  the distances themselves are rounded, by up to 0.06 of a cell with n = 16, which moves every box.
- A product with a constant that is no matrix, such as GroundingDINO's attention to its text (four dimensions) or the
  distances of D-FINE (one). PaddleSlim quantizes it along axis 1, which is no axis of output channels, or does not
  exist; ONNX Runtime refuses such scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import RESHAPING
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph

DISTRIBUTION = "mean of a distribution over box distances (DFL)"
NO_MATRIX = "product with a constant that is no matrix"


def float_by_default(graph: StaticGraph, ops: Sequence[QuantizableOp]) -> dict[str, str]:
    """Return the ops that stay float by default.

    Args:
        graph: a float graph.
        ops: its quantizable ops.

    Returns:
        Name of the op -> the reason.
    """
    block = graph.program.global_block()
    index = GraphIndex(block.ops)
    found = {}
    for op in ops:
        if op.weight is None:
            continue
        shape = tuple(block.var(op.weight).shape)
        # A vector has one output.
        outputs = 1 if len(shape) == 1 else shape[op.weight_axis]
        if outputs == 1 and reads_distribution(index, op.activations[0]):
            found[op.name] = DISTRIBUTION
        elif op.type == "matmul_v2" and len(shape) != 2:
            found[op.name] = NO_MATRIX
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
