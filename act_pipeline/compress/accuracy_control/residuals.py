"""Residual connections of rounded maps: their additions read what the next convolution reads.

A block of a ResNet reads a map twice: its first convolution reads it rounded to INT8, its residual connection as it is.
So the map is written in float and rounded afterwards. Where the addition, and a pooling on the way to it, read the
rounded map too, the convolution before writes bytes, and nothing else is left to write. NNCF and TensorRT's own
calibration round residual connections in this way. It is one more rounding of what the connection carries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import DEQUANTIZE, QUANTIZE
from act_pipeline.graph.static_graph import StaticGraph


def round_residuals(model: InferenceModel, directory: Path) -> tuple[InferenceModel, list[str]]:
    """Write a copy of an INT8 model whose residual connections read rounded maps; call it within :func:`static_mode`.

    Only maps [N, C, H, W] count that no op reads in float then.

    Args:
        model: the INT8 model; it is not changed.
        directory: an existing folder for the new model.

    Returns:
        The new model, and the first outputs of the ops that read a rounded map there and not before. Without any, the
        model is ``model``, and nothing is written.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        changed = []
        for name, rounded, readers in _maps(graph):
            for op in readers:
                op._rename_input(name, rounded)
                changed.append(str(op.output_arg_names[0]))
        return (graph.save(directory), changed) if changed else (model, changed)


def _maps(graph: StaticGraph) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield each map of which residual connections are the only readers in float, its rounded one and these readers."""
    block = graph.program.global_block()
    index = GraphIndex(block.ops)
    position = {id(op): at for at, op in enumerate(index.ops)}
    fetched = {target.name for target in graph.fetch_targets}
    for name, readers in index.readers.items():
        pairs = [op for op in readers if op.type == QUANTIZE and op.input("X") == [name]]
        others = [op for op in readers if op not in pairs]
        if len(pairs) != 1 or not others or name in fetched or len(block.var(name).shape) != 4:
            continue
        dequantize = [op for op in index.readers.get(pairs[0].output("Y")[0], ()) if op.type == DEQUANTIZE]
        if len(dequantize) != 1 or any(position[id(op)] < position[id(dequantize[0])] for op in others):
            continue
        if all(_is_residual(graph, op) for op in others):
            yield name, dequantize[0].output("Y")[0], others


def _is_residual(graph: StaticGraph, op: Any) -> bool:
    """Return whether an op adds two activations, or pools one."""
    if op.type == "pool2d":
        return True
    return op.type == "elementwise_add" and not any(graph.is_parameter(name) for name in op.input_arg_names)
