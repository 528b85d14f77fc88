"""Residual connections with a convolution of their own, as at the start of each stage of a ResNet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.static_graph import StaticGraph


class Shortcut(NamedTuple):
    """A map that a convolution makes for an addition only.

    Attributes:
        name: the map, float32 [N, C, H, W].
        addition: the ``elementwise_add`` of it and of another convolution's output.
    """

    name: str
    addition: Any


def shortcuts(graph: StaticGraph) -> Iterator[Shortcut]:
    """Yield, of each addition of two convolutions' outputs, the one that takes fewer multiplications.

    Args:
        graph: a graph with folded BatchNorm, float or INT8.
    """
    block = graph.program.global_block()
    index = GraphIndex(block.ops)
    fetched = {target.name for target in graph.fetch_targets}
    for op in block.ops:
        if op.type != "elementwise_add" or any(graph.is_parameter(name) for name in op.input_arg_names):
            continue
        names = [*op.input("X"), *op.input("Y")]
        if any(len(index.readers[name]) != 1 or name in fetched for name in names) or len(set(names)) < 2:
            continue
        costs = [_multiplications(graph, index, name) for name in names]
        first, second = costs
        if first is None or second is None or block.var(names[0]).shape != block.var(names[1]).shape:
            continue
        yield Shortcut(names[0] if first < second else names[1], op)


def _multiplications(graph: StaticGraph, index: GraphIndex, name: str) -> Optional[int]:
    """Return how many multiplications make one element of a convolution's output; None for another op's."""
    op = index.producer.get(name)
    if op is not None and op.type == "elementwise_add" and graph.is_parameter(op.input("Y")[0]):
        op = index.producer.get(op.input("X")[0])
        if op is not None and len(index.readers[op.output_arg_names[0]]) != 1:
            return None
    if op is None or op.type not in CONVOLUTIONS:
        return None
    return math.prod(graph.program.global_block().var(op.input("Filter")[0]).shape[1:])
