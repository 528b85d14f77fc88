"""Bias correction: subtract the mean output error of rounded weights from the bias.

Rounding a weight ``W`` to ``Q(W)`` shifts the mean of an output channel by ``E[(Q(W) - W) x] = (Q(W) - W) E[x]``, where
x is the op's float input and the mean is over images and positions. The corrected bias is
``b' = b - (Q(W) - W) E[x]``: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019, section 4.2, with ``E[x]`` measured on the calibration images. NNCF's fast bias correction measures the same
shift by running each layer on ``E[x]``. PaddleSlim's ``bias_correction`` (Banner et al. 2018) is a different method: it
shifts and scales the rounded weights to the mean and deviation of the float weights, and uses no images.

For a convolution, ``E[x]`` is used at every position; the zeros of its padding are neglected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.graph.int8_rounding import LEVELS, to_int8, weight_threshold
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import CONVOLUTIONS, QUANTIZABLE_OPS
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class Bias:
    """A bias that can be corrected, and the op before it.

    Attributes:
        op: the op's first output.
        name: name of the bias, a parameter with one value for each output channel.
        weight: name of the op's weight: [out, in / groups, kh, kw] for a convolution, else [in, out].
        source: name of the op's input activation.
        channel_axis: axis of the channels in ``source``.
        groups: groups of a convolution.
        transposed: whether the weight of a matmul is [out, in].
    """

    op: str
    name: str
    weight: str
    source: str
    channel_axis: int
    groups: int = 1
    transposed: bool = False


def find_biases(graph: StaticGraph, op_types: Collection[str]) -> list[Bias]:
    """Return the biases that are added to the outputs of ops with weights, where bias and weight are not shared.

    Args:
        graph: a float graph with folded BatchNorm.
        op_types: the op types that are quantized; only convolutions and ``matmul_v2`` are considered.
    """
    index = GraphIndex(graph.program.global_block().ops)
    weighted = [op for op in index.ops if op.type in op_types and op.type in QUANTIZABLE_OPS]
    found = [bias for bias in (_bias_after(graph, index, op) for op in weighted) if bias is not None]
    shared = Counter(bias.weight for bias in found)
    return [bias for bias in found if shared[bias.weight] == 1]


def _bias_after(graph: StaticGraph, index: GraphIndex, op: Any) -> Optional[Bias]:
    """Return the bias that is added to an op's output; None if there is none, or others use it too."""
    convolution = op.type in CONVOLUTIONS
    source, weight = (op.input(slot)[0] for slot in (("Input", "Filter") if convolution else ("X", "Y")))
    if not graph.is_parameter(weight) or graph.is_parameter(source):
        return None
    block = graph.program.global_block()
    shape = block.var(weight).shape
    if not convolution and (len(shape) != 2 or op.attr("trans_x")):
        return None
    output = op.output_arg_names[0]
    readers = index.readers.get(output, [])
    if [reader.type for reader in readers] != ["elementwise_add"] or readers[0].input("X")[0] != output:
        return None
    transposed = not convolution and bool(op.attr("trans_y"))
    channels = shape[0] if convolution or transposed else shape[1]
    name = readers[0].input("Y")[0]
    if not graph.is_parameter(name) or math.prod(block.var(name).shape) != channels or len(index.readers[name]) != 1:
        return None
    groups = int(op.attr("groups")) if convolution else 1
    return Bias(output, name, weight, source, 1 if convolution else -1, groups, transposed)


def correct_biases(
    graph: StaticGraph, biases: Sequence[Bias], means: Mapping[str, np.ndarray], per_channel: bool = True
) -> int:
    """Correct biases in the graph's scope; the weights must still be float there.

    Args:
        graph: the float graph.
        biases: biases of :func:`find_biases`.
        means: activation -> mean of each channel, [in].
        per_channel: whether weights are rounded with one scale for each output channel, else with one scale.

    Returns:
        The number of corrected biases.
    """
    for bias in biases:
        value = graph.parameter(bias.name)
        shift = output_shift(graph.parameter(bias.weight), means[bias.source], bias, per_channel)
        graph.set_parameter(bias.name, (value - shift.reshape(value.shape)).astype(value.dtype))
    return len(biases)


def output_shift(weight: np.ndarray, mean: np.ndarray, bias: Bias, per_channel: bool = True) -> np.ndarray:
    """Return the shift of an op's output that the rounding of its weight causes, ``(Q(W) - W) E[x]``.

    Args:
        weight: the float weight, with the shape described in :class:`Bias`.
        mean: mean of each channel of the op's input, [in].
        bias: the layout of the weight: ``groups`` and ``transposed``.
        per_channel: whether Q has one scale for each output channel, else one scale.

    Returns:
        float64 [out].
    """
    if weight.ndim == 2:
        error = rounding_error(weight, (0 if bias.transposed else 1) if per_channel else -1)
        return (error if bias.transposed else error.T) @ mean
    error = rounding_error(weight, 0 if per_channel else -1).sum(axis=(2, 3))  # [out, in / groups]
    means = mean.reshape(bias.groups, -1)  # [groups, in / groups]
    return (error.reshape(bias.groups, -1, error.shape[1]) @ means[:, :, None]).reshape(-1)


def rounding_error(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return the error of INT8 rounding, ``Q(W) - W``.

    Args:
        weight: the float weight, any shape.
        axis: the axis with one scale for each channel; -1: one scale for the whole weight.

    Returns:
        float64, the shape of ``weight``.
    """
    shape = [1] * weight.ndim
    if axis >= 0:
        shape[axis] = -1
    step = weight_threshold(weight, axis).astype(np.float64).reshape(shape) / LEVELS
    exact = weight.astype(np.float64)
    return to_int8(exact, step) * step - exact
