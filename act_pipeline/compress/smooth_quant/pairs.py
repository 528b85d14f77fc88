"""Cross-layer equalization: convolutions and matmuls whose output channels can be scaled for the ops that read them.

If ``f(a x) = a f(x)`` for every ``a > 0``, as for ReLU and for no activation at all, then
``W2 f(W1 x + b) = (W2 S) f((W1 x + b) / S)`` for any positive factor of each channel between the two: Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1. These factors fold
into ``W1`` and ``b``, and cost nothing at inference.

The paper chooses the factors from the ranges of the weights, which have one scale for a whole layer there. Here every
output channel of a weight has its own scale, so dividing ``W1`` costs nothing; what counts is the range of the
activation between the two, which has a single scale, against that of the input channels of ``W2``. Both are balanced
in the way that SmoothQuant balances them (:mod:`act_pipeline.compress.smooth_quant.factors`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.smooth_quant.groups import MATMUL, MOVERS, ChannelIndex, Reader, SmoothGroup
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.static_graph import StaticGraph

# Ops f with f(a x) = a f(x) for a > 0 in each channel. Not ReLU6, hard swish, SiLU or GELU.
_HOMOGENEOUS = ("relu", "leaky_relu", "pool2d", "nearest_interp_v2", "bilinear_interp_v2")


def find_pairs(graph: StaticGraph, exclude: Collection[str] = ()) -> list[SmoothGroup]:
    """Return the groups whose factors fold into the convolution or matmul before them, in the order of the graph.

    Every op that reads the output of such a convolution, with its bias, must be a convolution or matmul with a weight
    of its own. Between them may be ops ``f`` with ``f(a x) = a f(x)`` for ``a > 0``, and concatenations with other
    channels.

    Args:
        graph: a float graph with folded constants and BatchNorm.
        exclude: outputs of ops that stay float; a group needs a reader that does not.
    """
    index = ChannelIndex(graph)
    found = (_pair_after(index, op) for op in index.block.ops if op.type in (*CONVOLUTIONS, MATMUL))
    return [pair for pair in found if pair is not None and not set(pair.ops) <= set(exclude)]


def _pair_after(index: ChannelIndex, op: Any) -> Optional[SmoothGroup]:
    weight = _own_weight(index, op)
    if weight is None:
        return None
    convolution = op.type in CONVOLUTIONS
    axis, out_axis = (1, 0) if convolution else (-1, 0 if op.attr("trans_y") else 1)
    divided: dict[str, int | None] = {weight: out_axis}
    channels = int(index.block.var(weight).shape[out_axis])
    output = name = op.output_arg_names[0]
    after = _only_reader(index, name)
    if after is not None and after.type == "elementwise_add" and after.input("X")[0] == name:
        bias = after.input("Y")[0]
        if not _is_own(index, bias) or np.prod(index.block.var(bias).shape) != channels:
            return None
        divided[bias] = None
        name = after.output("Out")[0]
    activation = name
    while (after := _only_reader(index, activation)) is not None and after.type in _HOMOGENEOUS:
        activation = after.output("Out")[0]
    readers = _readers(index, name, axis, 0)
    if not readers or len({reader.op for reader in readers}) < len(readers):
        return None
    return SmoothGroup(activation, axis, output, divided, tuple(readers), channels)


def _readers(index: ChannelIndex, name: str, axis: int, first: int) -> Optional[list[Reader]]:
    """Return the ops with weights that read a tensor's channels, in the end; None if something else does.

    Args:
        index: the graph.
        name: the tensor.
        axis: the axis of the channels, 1 or -1.
        first: index of the first of the group's channels in the tensor.
    """
    if name in index.outputs:
        return None
    found: list[Reader] = []
    for op in index.readers.get(name, ()):
        further: Optional[list[Reader]] = None
        if op.type in _HOMOGENEOUS or (op.type in MOVERS and axis == -1 and _moves(index, op, name)):
            further = _readers(index, op.output("Out")[0], axis, first)
        elif op.type == "concat":
            before = _channels_before(index, op, name, axis)
            further = None if before is None else _readers(index, op.output("Out")[0], axis, first + before)
        else:
            reader = _reader(index, op, name, axis, first)
            further = None if reader is None else [reader]
        if further is None:
            return None
        found += further
    return found


def _reader(index: ChannelIndex, op: Any, name: str, axis: int, first: int) -> Optional[Reader]:
    """Return the op as a reader of a tensor's channels; None if it is none."""
    if op.type not in ((MATMUL,) if axis == -1 else CONVOLUTIONS):
        return None
    weight = _own_weight(index, op)
    if weight is None or op.input("X" if axis == -1 else "Input")[0] != name:
        return None
    turned = axis == -1 and bool(op.attr("trans_y"))
    return Reader(op.output_arg_names[0], weight, turned, axis == 1 and op.attr("groups") > 1, first)


def _own_weight(index: ChannelIndex, op: Any) -> Optional[str]:
    """Return the weight of a dense or depthwise convolution, or of a matmul, if no other op reads it; else None."""
    if op.type in CONVOLUTIONS:
        name, groups = op.input("Filter")[0], op.attr("groups")
        if not _is_own(index, name) or (op.has_attr("data_format") and op.attr("data_format") == "NHWC"):
            return None
        shape = index.block.var(name).shape
        return name if groups == 1 or (shape[0] == groups and shape[1] == 1) else None
    name = op.input("Y")[0]
    fits = _is_own(index, name) and not op.attr("trans_x") and len(index.block.var(name).shape) == 2
    return name if fits else None


def _is_own(index: ChannelIndex, name: str) -> bool:
    """Return whether a tensor is a float32 parameter with one reader."""
    graph = index.graph
    if not graph.is_parameter(name) or len(index.readers[name]) != 1:
        return False
    return bool(graph.parameter(name).dtype == np.float32)


def _only_reader(index: ChannelIndex, name: str) -> Any:
    readers = index.readers.get(name, [])
    return readers[0] if len(readers) == 1 and name not in index.outputs else None


def _moves(index: ChannelIndex, op: Any, name: str) -> bool:
    return index.keeps_channels(op, name, op.output("Out")[0])


def _channels_before(index: ChannelIndex, op: Any, name: str, axis: int) -> Optional[int]:
    """Return the number of channels before those of a tensor in a concatenation; None if that is not known."""
    names, shape = op.input("X"), index.block.var(name).shape
    given = op.attr("axis")
    by_tensor = "AxisTensor" in op.input_names and op.input("AxisTensor")
    if names.count(name) != 1 or given % len(shape) != axis % len(shape) or by_tensor:
        return None
    sizes = [int(index.block.var(other).shape[axis]) for other in names[: names.index(name)]]
    return None if any(size < 1 for size in sizes) else sum(sizes)
