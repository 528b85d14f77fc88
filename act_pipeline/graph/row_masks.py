"""Rows that a constant mask sets to 0, as one product.

PaddleDetection's RT-DETR sets the memory to 0 where a cell has no valid anchor, by ``paddle.where(valid, memory, 0)``.
``where`` computes the common shape of its inputs by adding zeros of all of them to each, which is eight ops on tensors
of the size of the memory. The mask is a constant, so that the memory times the mask as numbers is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.graph.unread_ops import remove_unread


def multiply_by_masks(graph: StaticGraph) -> int:
    """Replace every ``where(mask, x, 0)`` of a constant mask [1, L, 1] and rows x [N, L, C] by ``x * mask``.

    Args:
        graph: a float graph with folded constants, changed in place.

    Returns:
        The number of ops replaced.
    """
    block = graph.program.global_block()
    replaced = 0
    for op in [op for op in block.ops if op.type == "where"]:
        search = _Search(graph)  # each replacement removes ops
        (condition,), (chosen,), (other,) = (op.input(slot) for slot in ("Condition", "X", "Y"))
        result = block.var(op.output("Out")[0])
        mask, rows = search.without_zeros(condition), block.var(search.without_zeros(chosen))
        if not search.is_zero(other) or not graph.is_parameter(mask) or len(rows.shape) != 3:
            continue
        if rows.dtype != result.dtype or list(rows.shape) != list(result.shape):
            continue
        if list(block.var(mask).shape) != [1, rows.shape[1], 1]:
            continue
        factor = graph.add_parameter(f"{result.name}.mask", graph.parameter(mask).astype(bool).astype(np.float32))
        inserter = Inserter(block, block.ops.index(op))
        inserter.add("elementwise_mul", {"X": rows, "Y": factor}, {"Out": result}, axis=-1)
        block._remove_op(block.ops.index(op), sync=False)
        remove_unread(block, [condition, chosen, other], [target.name for target in graph.fetch_targets])
        replaced += 1
    if replaced:
        graph.remove_unused_parameters()
    return replaced


class _Search:
    """Which tensors are all zero, and what is left of a sum without those."""

    def __init__(self, graph: StaticGraph) -> None:
        self._graph = graph
        self._producer = GraphIndex(graph.program.global_block().ops).producer

    def is_zero(self, name: str) -> bool:
        """Return whether all elements of a tensor are known to be 0."""
        if self._graph.is_parameter(name):
            return not self._graph.parameter(name).any()
        op = self._producer.get(name)
        if op is None:
            return False
        if op.type in ("fill_any_like", "fill_constant"):
            return float(op.attr("value")) == 0 and not _has_tensor(op, "ValueTensor")
        if op.type == "assign_value":
            return not any(any(op.attr(each) or ()) for each in op.attr_names if each.endswith("values"))
        if op.type == "elementwise_add":
            return self.is_zero(op.input("X")[0]) and self.is_zero(op.input("Y")[0])
        return bool(op.type == "cast" and self.is_zero(op.input("X")[0]))

    def without_zeros(self, name: str) -> str:
        """Return the tensor that a tensor is computed from by adding zeros and by conversion of its type.

        Where the zeros have more rows or columns, it has fewer than ``name``.
        """
        op = self._producer.get(name)
        if op is not None and op.type == "cast":
            return self.without_zeros(op.input("X")[0])
        if op is not None and op.type == "elementwise_add":
            first, second = op.input("X")[0], op.input("Y")[0]
            if self.is_zero(second):
                return self.without_zeros(first)
            if self.is_zero(first):
                return self.without_zeros(second)
        return name


def _has_tensor(op: Any, slot: str) -> bool:
    return slot in op.input_names and bool(op.input(slot))
