"""Checks of what an ONNX file claims, before anything computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.importers.onnx.source import LOOPS, Node, cannot_import

MAX_BYTES = (1 << 31) - 1  # a protobuf cannot be larger
MAX_ELEMENTS = 1 << 28  # of one value
REMEDY = "copy or export it again"


def graphs(graph: Any, depth: int = 0) -> Iterator[Any]:
    """Yield a graph and those in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graphs(inner, depth + 1)


def tensors(graph: Any) -> Iterator[Any]:
    """Yield all constant tensors of a graph and its inner graphs."""
    for holder in graphs(graph):
        yield from holder.initializer
        for node in holder.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def array(path: Path, tensor: Any) -> np.ndarray:
    """Return the value of a tensor.

    Raises:
        UserError: its data does not fit its shape or element type.
    """
    from onnx import numpy_helper

    try:
        if min(tensor.dims, default=1) < 0 or math.prod(tensor.dims) > MAX_BYTES:
            raise ValueError(f"its shape is {list(tensor.dims)}")
        return numpy_helper.to_array(tensor)
    except Exception as error:  # of many kinds, by what is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: the tensor {tensor.name!r} is damaged ({reason[:150]}); {REMEDY}") from None


def check_order(path: Path, graph: Any) -> None:
    """Check that every value is written once, before it is read.

    Raises:
        UserError: a name is unknown, or the graph has a loop.
    """
    written = {each.name for each in (*graph.input, *graph.initializer)}
    written.update(each.values.name for each in graph.sparse_initializer)
    if graph.sparse_initializer:
        raise UserError(f"{path} has sparse initializers, expected dense ones; export it without them")
    anywhere = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in written:
                reason = (
                    "only a later node writes: the graph has a loop or is not sorted"
                    if name in anywhere
                    else "nothing writes"
                )
                raise UserError(f"{path}: node {node.name!r} ({node.op_type}) reads {name!r}, which {reason}; {REMEDY}")
        for name in node.output:
            if name and name in written:
                raise UserError(f"{path}: node {node.name!r} ({node.op_type}) writes {name!r} a second time; {REMEDY}")
            written.add(name)
    for output in graph.output:
        if output.name not in written:
            raise UserError(f"{path}: the output {output.name!r} is written by no node; {REMEDY}")


def refuse_loops(path: Path, graph: Any) -> None:
    """Check that nothing repeats, before anything runs the graph: a file may ask for any number of repetitions.

    Raises:
        UserError: the graph, or a branch of it, has a Loop or a Scan.
    """
    for holder in graphs(graph):
        for node in holder.node:
            if node.op_type in ("Loop", "Scan"):
                raise cannot_import(path, Node(node.op_type, node.name, (), tuple(node.output)), LOOPS)


def limit_constants(path: Path, graph: Any) -> None:
    """Check constants that are made large by one node, before anything computes them.

    Raises:
        UserError: one has more elements than a model needs.
    """
    values = {each.name: each for each in graph.initializer}
    values.update(
        {
            node.output[0]: attribute.t
            for node in graph.node
            for attribute in node.attribute
            if node.op_type == "Constant" and attribute.HasField("t") and node.output
        }
    )
    for node in graph.node:
        index = {"ConstantOfShape": 0, "Expand": 1}.get(node.op_type)
        if index is None or index >= len(node.input) or node.input[index] not in values:
            continue
        shape = [int(size) for size in array(path, values[node.input[index]]).reshape(-1)]
        if math.prod(shape) > MAX_ELEMENTS:
            raise UserError(
                f"{path}: node {node.name!r} ({node.op_type}) makes {shape}, expected at most {MAX_ELEMENTS} values; "
                f"{REMEDY}"
            )


def limit_values(path: Path, model: Any) -> None:
    """Check the sizes of all values that follow from the shapes of the inputs, before anything computes them.

    Raises:
        UserError: one has more elements than a model needs.
    """
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # of many kinds, by what is damaged; ONNX Runtime names what
        return
    shapes = {
        each.name: [size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in (*inferred.value_info, *inferred.output)
    }
    for node in model.graph.node:
        for name in node.output:
            shape = shapes.get(name, [])
            if math.prod(shape) > MAX_ELEMENTS:
                raise UserError(
                    f"{path}: node {node.name!r} ({node.op_type}, output {name!r}) makes {shape}, expected at most "
                    f"{MAX_ELEMENTS} values; {REMEDY}, or give a smaller --input_shape"
                )
