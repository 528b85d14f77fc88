"""Bias correction: the mean error that rounded weights make is taken out of the bias.

Rounding a weight ``W`` to ``Q(W)`` moves the mean of an output channel by ``E[(Q(W) - W) x] = (Q(W) - W) E[x]``, x
being the op's float input, and its mean that over images and places. So ``b' = b - (Q(W) - W) E[x]``: Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with ``E[x]`` measured
on the calibration images. NNCF's fast bias correction measures the same shift by running each layer on ``E[x]``.
PaddleSlim's ``bias_correction`` (Banner et al. 2018) is another thing: it moves and stretches the rounded weights to
the mean and deviation of the float ones, and looks at no image.

A convolution is taken to see ``E[x]`` everywhere; the zeros of its padding, at the rim of the image, are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from act_pipeline.compress.paddleslim.int8_program import weight_threshold
from act_pipeline.graph.op_types import CONVOLUTIONS, QUANTIZABLE_OPS
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class Bias:
    """A bias that can be corrected, and the op before it.

    Attributes:
        op: the op's first output.
        name: the parameter, one value an output channel.
        weight: the op's weight, [out, in / groups, kh, kw] or [in, out].
        source: the op's activation.
        channel_axis: of ``source``.
        groups: of a convolution.
        transposed: the weight is [out, in].
    """

    op: str
    name: str
    weight: str
    source: str
    channel_axis: int
    groups: int = 1
    transposed: bool = False


def find_biases(graph: StaticGraph, op_types: Collection[str]) -> list[Bias]:
    """Return the biases that follow ops with weights, each read by one op alone.

    Args:
        graph: a float graph, BatchNorm folded.
        op_types: the ops that are quantized; of these, convolutions and ``matmul_v2`` are looked at.
    """
    block = graph.program.global_block()
    readers: dict[str, list] = {}
    for op in block.ops:
        for name in op.input_arg_names:
            readers.setdefault(name, []).append(op)
    found = []
    for op in block.ops:
        if op.type not in op_types or op.type not in QUANTIZABLE_OPS:
            continue
        convolution = op.type in CONVOLUTIONS
        source, weight = (op.input(slot)[0] for slot in (("Input", "Filter") if convolution else ("X", "Y")))
        if not graph.is_parameter(weight) or graph.is_parameter(source):
            continue
        shape = block.var(weight).shape
        if not convolution and (len(shape) != 2 or op.attr("trans_x")):
            continue
        transposed = not convolution and bool(op.attr("trans_y"))
        channels = shape[0] if convolution or transposed else shape[1]
        output = op.output_arg_names[0]
        adds = [reader for reader in readers.get(output, ()) if reader.type == "elementwise_add"]
        if len(adds) != 1 or len(readers[output]) != 1 or adds[0].input("X")[0] != output:
            continue
        name = adds[0].input("Y")[0]
        if not graph.is_parameter(name) or math.prod(block.var(name).shape) != channels or len(readers[name]) != 1:
            continue
        groups = int(op.attr("groups")) if convolution else 1
        found.append(Bias(output, name, weight, source, 1 if convolution else -1, groups, transposed))
    shared = Counter(bias.weight for bias in found)
    return [bias for bias in found if shared[bias.weight] == 1]


def correct_biases(
    graph: StaticGraph, biases: Sequence[Bias], means: Mapping[str, np.ndarray], per_channel: bool = True
) -> int:
    """Correct biases in the graph's scope; the weights must still be float there.

    Args:
        graph: the float graph.
        biases: of :func:`find_biases`.
        means: activation -> the mean of each channel.
        per_channel: weights are rounded with a scale for each output channel, else with one.

    Returns:
        how many were corrected.
    """
    for bias in biases:
        value = graph.parameter(bias.name)
        shift = output_shift(graph.parameter(bias.weight), means[bias.source], bias, per_channel)
        graph.set_parameter(bias.name, (value - shift.reshape(value.shape)).astype(value.dtype))
    return len(biases)


def output_shift(weight: np.ndarray, mean: np.ndarray, bias: Bias, per_channel: bool = True) -> np.ndarray:
    """Return ``(Q(W) - W) E[x]``, float64 [out]; Q rounds to INT8.

    Args:
        weight: the float weight.
        mean: of the op's input, [in].
        bias: says how the two meet.
        per_channel: Q has a scale for each output channel, else one.
    """
    if weight.ndim == 2:
        error = rounding_error(weight, (0 if bias.transposed else 1) if per_channel else -1)
        return (error if bias.transposed else error.T) @ mean
    error = rounding_error(weight, 0 if per_channel else -1).sum(axis=(2, 3))  # [out, in / groups]
    means = mean.reshape(bias.groups, -1)  # [groups, in / groups]
    return (error.reshape(bias.groups, -1, error.shape[1]) @ means[:, :, None]).reshape(-1)


def rounding_error(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return ``Q(W) - W`` in float64, Q with one scale a channel along ``axis``, or one scale for an axis of -1."""
    shape = [1] * weight.ndim
    if axis >= 0:
        shape[axis] = -1
    step = weight_threshold(weight, axis).astype(np.float64).reshape(shape) / 127
    exact = weight.astype(np.float64)
    return np.rint(exact / step) * step - exact
