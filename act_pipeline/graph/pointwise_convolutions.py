"""1 x 1 convolutions with a bias, as matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class PointwiseConvolution:
    """A 1 x 1 convolution and the op that adds its bias.

    Attributes:
        op: the convolution.
        addition: the only reader of its output.
        weight: its weight, float64 [out, in].
        bias: its bias, float64 [out].
    """

    op: Any
    addition: Any
    weight: np.ndarray
    bias: np.ndarray

    @property
    def name(self) -> str:
        """Name of its weight."""
        return str(self.op.input("Filter")[0])


def pointwise_convolution(graph: StaticGraph, index: GraphIndex, op: Any) -> Optional[PointwiseConvolution]:
    """Return a 1 x 1 convolution of all channels whose weight and bias nothing else reads.

    Args:
        graph: a float graph with folded BatchNorm.
        index: its ops.
        op: any op, or None.

    Returns:
        None if the op is something else.
    """
    if op is None or op.type != "conv2d" or op.attr("groups") != 1 or list(op.attr("strides")) != [1, 1]:
        return None
    weight, added = op.input("Filter")[0], index.readers.get(op.output("Output")[0], [])
    if any(op.attr("paddings")) or "Bias" in op.input_names or [reader.type for reader in added] != ["elementwise_add"]:
        return None
    bias = added[0].input("Y")[0]
    if any(not graph.is_parameter(name) or len(index.readers[name]) != 1 for name in (weight, bias)):
        return None
    block, addition = graph.program.global_block(), added[0]
    outputs, shape = block.var(weight).shape[0], tuple(block.var(bias).shape)
    # A vector on another axis than the channels' would be added to columns of pixels.
    by_channel = addition.attr("axis") == 1 if len(shape) == 1 else shape[-3:] == (outputs, 1, 1)
    if tuple(block.var(weight).shape[2:]) != (1, 1) or not by_channel or addition.input("X") != op.output("Output"):
        return None
    values, constants = (graph.parameter(name).astype(np.float64) for name in (weight, bias))
    if constants.size != outputs:
        return None
    return PointwiseConvolution(op, added[0], values[:, :, 0, 0], constants.reshape(-1))


def add_pointwise(
    graph: StaticGraph, inserter: Inserter, like: Any, source: Any, name: str, weight: np.ndarray, bias: np.ndarray
) -> tuple[Any, Any]:
    """Add a 1 x 1 convolution and its bias to a graph.

    Args:
        graph: the graph.
        inserter: where.
        like: a 1 x 1 convolution with the attributes of the new one.
        source: the variable that it reads, [N, in, H, W].
        name: name of its weight, which the names of its other variables begin with.
        weight: [out, in].
        bias: [out].

    Returns:
        The op of the convolution, and the variable of its output with the bias, [N, out, H, W].
    """
    block = graph.program.global_block()
    filters = graph.add_parameter(name, weight[:, :, None, None].astype(np.float32))
    added = graph.add_parameter(f"{name}.bias", bias.astype(np.float32))
    shape = [source.shape[0], len(weight), *source.shape[2:]]
    product, result = (
        block.create_var(name=f"{name}.{end}", shape=shape, dtype=source.dtype) for end in ("out", "sum")
    )
    op = inserter.add("conv2d", {"Input": source, "Filter": filters}, {"Output": product}, **attributes(like))
    inserter.add("elementwise_add", {"X": product, "Y": added}, {"Out": result}, axis=1)
    return op, result


def attributes(op: Any) -> dict[str, Any]:
    """Return the attributes of an op by name, for another one like it."""
    return {name: op.attr(name) for name in op.attr_names}
