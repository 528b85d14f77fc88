"""Projections of a decoder's memory, computed with fewer multiplications and the same result.

RT-DETR projects each level of its neck by a 1 x 1 convolution without an activation, flattens and concatenates the
levels to the memory, and the memory is read by linear layers alone: one for the query selection, and one for the values
of each decoder layer. Two linear functions in a row are one,

    W (P x + p) + b = (W P) x + (W p + b),

so every reader becomes a 1 x 1 convolution of each level, and the projections are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.graph.name_scopes import set_level
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.pointwise_convolutions import PointwiseConvolution, add_pointwise, pointwise_convolution
from act_pipeline.graph.rtdetr_modules import find_places
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.graph.unread_ops import remove_unread

_FLATTEN = "flatten_contiguous_range"


@dataclass(frozen=True)
class _Reader:
    """A linear layer that reads the memory.

    Attributes:
        product: the ``matmul_v2``.
        addition: the op that adds its bias.
        mask: the op before, which multiplies the memory by a constant [1, L, 1]; None: it reads the memory itself.
    """

    product: Any
    addition: Any
    mask: Any = None

    @property
    def replaced(self) -> Any:
        """The op that writes what the levels are computed to: with a mask, the layer's bias is added after it."""
        return self.product if self.mask else self.addition


def merge_memory_projections(graph: StaticGraph) -> int:
    """Make the projections of a memory's levels part of the linear layers that read it.

    Args:
        graph: a float graph with folded constants and BatchNorm, changed in place.

    Returns:
        The number of linear layers that were rewritten.
    """
    block = graph.program.global_block()
    fetched = {target.name for target in graph.fetch_targets}
    rewritten = 0
    for concat in [op for op in block.ops if op.type == "concat"]:
        memory, index = concat.output("Out")[0], GraphIndex(block.ops)
        if memory in fetched or len(block.var(memory).shape) != 3 or concat.attr("axis") not in (1, -2):
            continue
        projections = [found for name in concat.input("X") if (found := _projection(graph, index, name))]
        reading = index.readers.get(memory, [])
        sizing = [op for op in reading if op.type == "shape"]
        readers = [reader for op in reading if (reader := _reader(graph, index, memory, op))]
        if not readers or len(projections) < len(concat.input("X")) or len(readers) + len(sizing) < len(reading):
            continue
        if sizing and block.var(readers[0].product.output("Out")[0]).shape[2] != block.var(memory).shape[2]:
            continue  # the first result takes the memory's place there
        _rewrite(graph, concat, projections, readers, sizing)
        rewritten += len(readers)
    if rewritten:
        graph.remove_unused_parameters()
    return rewritten


def _projection(graph: StaticGraph, index: GraphIndex, name: str) -> Optional[PointwiseConvolution]:
    """Return the convolution whose output, flattened, is a tensor [N, H * W, C], if nothing else reads any between."""
    transpose = _alone(index, name, "transpose2")
    flatten = transpose and _alone(index, transpose.input("X")[0], _FLATTEN)
    if not flatten or list(transpose.attr("axis")) != [0, 2, 1]:
        return None
    if len(graph.program.global_block().var(flatten.input("X")[0]).shape) != 4 or flatten.attr("start_axis") != 2:
        return None
    added = _alone(index, flatten.input("X")[0], "elementwise_add")
    return pointwise_convolution(graph, index, index.producer.get(added.input("X")[0])) if added else None


def _reader(graph: StaticGraph, index: GraphIndex, memory: str, op: Any) -> Optional[_Reader]:
    """Return the linear layer that reads the memory by an op; None if it is something else."""
    mask = None
    if op.type == "elementwise_mul" and _is_mask(graph, op, memory):
        readers = index.readers.get(op.output("Out")[0], [])
        if len(readers) != 1:
            return None
        mask, op, memory = op, readers[0], op.output("Out")[0]
    if op.type != "matmul_v2" or op.input("X") != [memory] or op.attr("trans_x") or op.attr("trans_y"):
        return None
    weight, added = op.input("Y")[0], index.readers.get(op.output("Out")[0], [])
    if not graph.is_parameter(weight) or len(index.readers[weight]) != 1:
        return None
    if [each.type for each in added] != ["elementwise_add"] or added[0].input("X") != op.output("Out"):
        return None
    bias, block = added[0].input("Y")[0], graph.program.global_block()
    if not graph.is_parameter(bias) or tuple(block.var(bias).shape) != tuple(block.var(weight).shape[1:]):
        return None
    return _Reader(op, added[0], mask)


def _is_mask(graph: StaticGraph, op: Any, memory: str) -> bool:
    """Return whether an op multiplies each row of the memory by a constant."""
    block, factor = graph.program.global_block(), op.input("Y")[0]
    rows = block.var(memory).shape[1]
    return op.input("X") == [memory] and graph.is_parameter(factor) and tuple(block.var(factor).shape) == (1, rows, 1)


def _alone(index: GraphIndex, name: str, kind: str) -> Any:
    """Return the op of a type that writes a tensor that is read once; else None."""
    op = index.producer.get(name)
    return op if op is not None and op.type == kind and len(index.readers[name]) == 1 else None


def _rewrite(
    graph: StaticGraph,
    concat: Any,
    projections: Sequence[PointwiseConvolution],
    readers: Sequence[_Reader],
    sizing: Sequence[Any],
) -> None:
    """Let every reader read the levels, and the ops that ask for the memory's sizes ask for those of a result."""
    block, places = graph.program.global_block(), find_places(graph)
    inserter = Inserter(block, block.ops.index(concat))
    results = [
        _add_reader(graph, inserter, projections, reader, places[reader.product.output("Out")[0]].module)
        for reader in readers
    ]
    for op in sizing:
        op.desc.set_input("Input", results[:1])
    for reader in readers:
        read = reader.replaced.input_arg_names
        block._remove_op(block.ops.index(reader.replaced), sync=False)
        remove_unread(block, read, [target.name for target in graph.fetch_targets])


def _add_reader(
    graph: StaticGraph, inserter: Inserter, projections: Sequence[PointwiseConvolution], reader: _Reader, module: str
) -> str:
    """Compute a linear layer of the levels, and return the name of its result [N, L, outputs].

    A mask multiplies the memory, but not the layer's bias: with a mask, the result is what the mask multiplies.
    """
    block = graph.program.global_block()
    name = reader.product.input("Y")[0]
    weight = graph.parameter(name).astype(np.float64)
    bias = 0.0 if reader.mask else graph.parameter(reader.addition.input("Y")[0]).astype(np.float64)
    result = block.var(reader.replaced.output("Out")[0])
    rows = []
    for level, projection in enumerate(projections):
        part, source = f"{name}.level_{level}", block.var(projection.op.input("Input")[0])
        merged, constant = weight.T @ projection.weight, projection.bias @ weight + bias
        conv, output = add_pointwise(graph, inserter, projection.op, source, part, merged, constant)
        set_level(conv, module, level)
        rows.append(_add_flattening(block, inserter, output, part))
    if not reader.mask:
        inserter.add("concat", {"X": rows}, {"Out": result}, axis=1)
        return str(result.name)
    joined = block.create_var(name=f"{name}.levels", shape=list(result.shape), dtype=result.dtype)
    inserter.add("concat", {"X": rows}, {"Out": joined}, axis=1)
    mask = block.var(reader.mask.input("Y")[0])
    inserter.add("elementwise_mul", {"X": joined, "Y": mask}, {"Out": result}, axis=-1)
    return str(joined.name)


def _add_flattening(block: Any, inserter: Inserter, source: Any, name: str) -> Any:
    """Flatten a variable [N, C, H, W] to [N, H * W, C], and return that variable."""
    count, channels, height, width = source.shape
    pixels = height * width if min(height, width) > 0 else -1

    def declare(end: str, *shape: int) -> Any:
        return block.create_var(name=f"{name}.{end}", shape=shape, dtype=source.dtype)

    columns, rows = declare("columns", count, channels, pixels), declare("rows", count, pixels, channels)
    outputs = {"Out": columns, "XShape": declare("columns_from", 0, *source.shape)}
    inserter.add(_FLATTEN, {"X": source}, outputs, start_axis=2, stop_axis=3)
    outputs = {"Out": rows, "XShape": declare("rows_from", 0, *columns.shape)}
    inserter.add("transpose2", {"X": columns}, outputs, axis=[0, 2, 1])
    return rows
