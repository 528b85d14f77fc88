"""Ops that stay float unless the user names them, since INT8 distorts them or a runtime refuses it.

- The mean of a distribution. YOLOv6, v8 and v11, PP-YOLOE and D-FINE predict a distribution over n distances for each
  side of a box, and multiply it by the row of the distances (Generalized Focal Loss, Li et al. 2020, "DFL"). In INT8
  the distances themselves are rounded, by up to 0.06 of a cell with n = 16, which moves every box.
- Linear attention, whose quotient has both parts from one product: ``q (k^T [v, 1])``, the last column of which is the
  sum that the others are divided by (EfficientViT, Cai et al. 2023). One scale has to hold the sums too, which are
  larger than the rest, and an error of a sum is one of a whole row.
- Similarities that are scores themselves: a product of two activations, of queries and a prompt's tokens
  (GroundingDINO) or of mask features (Segment Anything), that is an output or ranks the queries of a top-k. Its
  rounding is that of the scores. It is small: the four of a GroundingDINO are a third of what INT8 changes its scores.
- A product with a constant that is no matrix, such as GroundingDINO's attention to its text (four dimensions) or the
  distances of D-FINE (one). PaddleSlim quantizes it along axis 1, which is no axis of output channels, or does not
  exist; ONNX Runtime refuses such scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import RESHAPING, TOP_K
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph

# Ops between a product and its quotient: slices, moved or with a small number added.
_PARTS = (*RESHAPING, "slice", "strided_slice", "split", "transpose2", "scale")
# Ops between a similarity and the output or the top-k: they move, mask, scale or squash it.
_SCORING = (
    *RESHAPING, "slice", "strided_slice", "split", "transpose2", "squeeze2", "unsqueeze2", "concat", "stack", "pad",
    "pad3d", "where", "cast", "assign", "scale", "clip", "sigmoid", "softmax", "reduce_max", "elementwise_add",
    "elementwise_sub", "elementwise_mul", "elementwise_div",
)  # fmt: skip
SIMILARITY = "similarity of two activations that is a score itself: INT8 would round every score"
LINEAR_ATTENTION = "sums of a linear attention: one INT8 scale cannot hold them beside the rest"
DISTRIBUTION = "mean of a distribution over box distances (DFL): INT8 would round the distances and move every box"
NO_MATRIX = "product with a constant that is no matrix: runtimes refuse its INT8 scales"
# What INT8 distorts in most models, not in all: reason -> name of the group of ops. What a runtime refuses is not here.
MAY_BE_INT8 = {
    LINEAR_ATTENTION: "linear attention",
    SIMILARITY: "similarities that are scores",
    DISTRIBUTION: "mean of a distribution (DFL)",
}


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
    attention = _linear_attention(index, {op.name: op for op in ops if op.type == "matmul_v2"})
    similarities = set(_scores(graph, index))
    found = {}
    for op in ops:
        if op.weight is None and op.name in similarities:
            found[op.name] = SIMILARITY
        if op.name in attention:
            found[op.name] = LINEAR_ATTENTION
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


def _linear_attention(index: GraphIndex, ops: Mapping[str, QuantizableOp]) -> set[str]:
    """Return the products of two activations of which one part is divided by another, and the products they read."""
    found = set()
    for quotient in index.ops:
        if quotient.type != "elementwise_div":
            continue
        divided, by = (_whole(index, quotient.input(slot)[0]) for slot in ("X", "Y"))
        product = ops.get(divided) if divided == by else None
        if product is None or product.weight is not None:
            continue
        inner = (ops.get(_whole(index, name)) for name in product.activations)
        found.update([product.name, *(op.name for op in inner if op is not None and op.weight is None)])
    return found


def _scores(graph: StaticGraph, index: GraphIndex) -> Iterator[str]:
    """Yield what the outputs of a graph and the inputs of its top-ks are computed from by ops of ``_SCORING`` alone."""
    waiting = [target.name for target in graph.fetch_targets]
    waiting += [op.input("X")[0] for op in index.ops if op.type in TOP_K]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        op = index.producer.get(name)
        if op is None or name in seen:
            continue
        seen.add(name)
        if op.type in _SCORING:
            waiting.extend(op.input_arg_names)
        else:
            yield name


def _whole(index: GraphIndex, name: str) -> str:
    """Return the tensor that a tensor is a part of."""
    return list(index.upstream(name, _PARTS))[-1]


def reads_distribution(index: GraphIndex, name: str) -> bool:
    """Return whether a tensor is the output of a softmax, possibly reshaped.

    Args:
        index: the ops of the graph.
        name: the tensor.
    """
    while name in index.producer and index.producer[name].type in RESHAPING:
        name = index.producer[name].input("X")[0]
    return name in index.producer and index.producer[name].type == "softmax"
