"""Residual connections of rounded maps: their additions read what the next convolution reads.

A block of a ResNet reads a map twice: its first convolution reads it rounded to INT8, its residual connection as it is.
So the map is written in float and rounded afterwards. Where the addition, and a pooling on the way to it, read the
rounded map too, the convolution before writes bytes, and nothing else is left to write. NNCF and TensorRT's own
calibration round residual connections in this way. It is one more rounding of what the connection carries.

At the start of a stage the connection has a convolution of its own. Its output is rounded too, so that runtimes add it
within the other convolution, which then writes bytes: two maps in float less, of the largest ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.compress.accuracy_control.revert import read_ranges
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.op_types import ACTIVATIONS, DEQUANTIZE, QUANTIZE
from act_pipeline.graph.residual_connections import Shortcut, shortcuts
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
        ranges = read_ranges(model)
        for shortcut in list(shortcuts(graph)):
            if ranges.get(shortcut.name, 0) > 0 and _sum_is_rounded(graph, shortcut):
                _round(graph, shortcut, ranges[shortcut.name])
                changed.append(str(shortcut.addition.output_arg_names[0]))
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


def _sum_is_rounded(graph: StaticGraph, shortcut: Shortcut) -> bool:
    """Return whether all that read the sum, after an activation function if there is one, read it rounded."""
    index = GraphIndex(graph.program.global_block().ops)
    name, fetched = shortcut.addition.output("Out")[0], {target.name for target in graph.fetch_targets}
    readers = index.readers.get(name, [])
    if len(readers) == 1 and readers[0].type in ACTIVATIONS and name not in fetched:
        name = readers[0].output("Out")[0]
        readers = index.readers.get(name, [])
    return bool(readers) and all(op.type == QUANTIZE for op in readers) and name not in fetched


def _round(graph: StaticGraph, shortcut: Shortcut, threshold: float) -> None:
    """Let an addition read a shortcut's map rounded to INT8."""
    block, name = graph.program.global_block(), shortcut.name
    scale = graph.add_parameter(f"{name}@scale", np.array([threshold], np.float32))
    like = block.var(name)
    inserter = Inserter(block, block.ops.index(shortcut.addition), quant_axis=-1, bit_length=8)
    held = like
    for op_type, end in ((QUANTIZE, "quantized"), (DEQUANTIZE, "quantized.dequantized")):
        zero = graph.add_parameter(f"{name}.{end}@zero_point", np.zeros(1, np.int32))
        made = block.create_var(name=f"{name}.{end}", shape=list(like.shape), dtype=like.dtype)
        inserter.add(op_type, {"X": held, "Scale": scale, "ZeroPoint": zero}, {"Y": made})
        held = made
    shortcut.addition._rename_input(name, held.name)
