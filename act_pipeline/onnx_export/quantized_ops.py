"""Export of convolutions and matmuls, which may compute in INT8, with BatchNorm and biases folded into them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op, QuantizedTensor


def same_padding(sizes: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Return the ONNX pads of Paddle's padding algorithm SAME; an odd pad is larger at the end.

    Args:
        sizes: input size along each spatial axis.
        kernel: kernel size along each spatial axis.
        strides: stride along each spatial axis.
        dilations: dilation along each spatial axis.

    Returns:
        The pads at the beginning of each axis, then those at the end.
    """
    begins, ends = [], []
    for size, edge, stride, dilation in zip(sizes, kernel, strides, dilations):
        total = max((-(-size // stride) - 1) * stride + (edge - 1) * dilation + 1 - size, 0)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return begins + ends


def pads(op: Op, sizes: tuple[int, ...], kernel: list[int], dilations: list[int]) -> list[int]:
    """Return the ONNX pads of a 2D convolution or pooling.

    Args:
        op: the op.
        sizes: (height, width) of its input.
        kernel: (height, width) of its kernel.
        dilations: dilation along height and width.

    Returns:
        Pads at top, left, bottom and right.
    """
    algorithm = op.attrs.get("padding_algorithm", "EXPLICIT")
    if algorithm == "VALID":
        return [0, 0, 0, 0]
    if algorithm == "SAME":
        return same_padding(sizes, kernel, list(op.attrs["strides"]), dilations)
    given = list(op.attrs["paddings"])
    if len(given) == 2:
        return [given[0], given[1], given[0], given[1]]
    return [given[0], given[2], given[1], given[3]]


def convolution(build: GraphBuilder, op: Op, followers: list[Op]) -> None:
    """Add a Conv with BatchNorm and bias folded into it.

    The fold does not change the integers' magnitudes: ``gamma / sigma`` becomes a factor of the output channel's weight
    scale, and where it is negative, the signs of the integers are inverted. The bias stays float.

    Args:
        build: the graph to extend.
        op: the convolution.
        followers: the BatchNorm and the addition of a constant for each channel after the convolution, in order; each
            is the only reader of the result before it.
    """
    filter_name = op.input("Filter")
    quantized = build.quantized.get(filter_name)
    channels = build.shapes[filter_name][0]
    factor, bias = np.ones(channels), np.zeros(channels)
    if "Bias" in op.inputs:
        bias = build.constants[op.input("Bias")].astype(np.float64).reshape(-1)
    for follower in followers:
        if follower.type == "batch_norm":
            gamma, beta, mean, variance = (
                build.constants[follower.input(slot)].astype(np.float64)
                for slot in ("Scale", "Bias", "Mean", "Variance")
            )
            step = gamma / np.sqrt(variance + follower.attrs["epsilon"])
            factor, bias = factor * step, (bias - mean) * step + beta
        else:
            bias = bias + build.constants[follower.input("Y")].astype(np.float64).reshape(-1)
    values = build.quantized.get(op.input("Input"))
    if quantized is not None and quantized.weight is not None:
        weight = build.dequantized(_scaled(quantized, quantized.weight, factor * _taken_over(build, values)))
    else:
        value, step = build.constants[filter_name], factor * _taken_over(build, values)
        weight = build.initializer((value * step[:, None, None, None]).astype(value.dtype), filter_name)
    inputs = [build.get(op.input("Input")) if values is None else build.dequantized(values, channel_axis=1), weight]
    if followers or "Bias" in op.inputs:
        inputs.append(build.initializer(bias.astype(np.float32), f"{filter_name}.bias"))
    kernel = list(build.shapes[filter_name][2:])
    dilations = list(op.attrs["dilations"])
    made = build.node(
        "Conv",
        inputs,
        op.output,
        kernel_shape=kernel,
        strides=list(op.attrs["strides"]),
        dilations=dilations,
        group=int(op.attrs["groups"]),
        pads=pads(op, build.shapes[op.input("Input")][2:], kernel, dilations),
    )
    for name in (op.output, *(follower.output for follower in followers)):
        build.values[name] = made


def _scaled(tensor: QuantizedTensor, weight: np.ndarray, factor: np.ndarray) -> QuantizedTensor:
    if np.all(factor == 1):
        return tensor
    scale = np.broadcast_to(tensor.scale, factor.shape) * np.abs(factor)
    sign = np.where(factor < 0, -1, 1)[:, None, None, None]
    # -(-128) does not fit into int8; Paddle's weights are within [-127, 127], so the clip changes nothing.
    weight = np.clip(weight.astype(np.int16) * sign, -128, 127).astype(np.int8)
    # A scale of zero (a channel whose BatchNorm gamma is zero) is rejected by runtimes.
    off = scale == 0
    weight[off] = 0
    return replace(tensor, scale=np.where(off, 1, scale).astype(np.float32), axis=0, weight=weight)


def _taken_over(build: GraphBuilder, tensor: QuantizedTensor | None) -> np.float32 | np.ndarray:
    """Return the scale that an activation was divided by (``unit_scales``), a factor of the other operand; else 1."""
    if build.unit_scales and tensor is not None and tensor.weight is None:
        return tensor.scale.reshape(())[()]
    return np.float32(1)


def matmul(build: GraphBuilder, op: Op) -> None:
    """Add a MatMul; a transposed operand is transposed before it is rounded.

    Args:
        build: the graph to extend.
        op: the ``matmul_v2`` op.
    """
    operands = []
    tensors = [build.quantized.get(op.input(slot)) for slot in ("X", "Y")]
    taken_over = [_taken_over(build, tensor) for tensor in tensors]
    for index, (slot, flag) in enumerate((("X", "trans_x"), ("Y", "trans_y"))):
        name, turn, tensor = op.input(slot), bool(op.attrs.get(flag)), tensors[index]
        if tensor is not None and tensor.weight is not None:
            scale = tensor.scale * taken_over[1 - index]
            operands.append(build.dequantized(replace(tensor, scale=scale), turn))
        elif tensor is not None:
            operands.append(build.dequantized(tensor, turn))
        elif not turn:
            operands.append(build.get(name))
        elif name in build.constants:
            operands.append(build.initializer(np.swapaxes(build.constants[name], -1, -2), name))
        else:
            operands.append(build.swap_last(build.get(name), name))
    made = build.node("MatMul", operands, op.output)
    if build.unit_scales and not any(tensor is not None and tensor.weight is not None for tensor in tensors):
        factor = np.full(max(build.shapes[op.output][-1], 1), taken_over[0] * taken_over[1], np.float32)
        if factor[0] != 1:
            made = build.node("Mul", [made, build.initializer(factor, f"{op.output}.scale")], op.output)
    build.values[op.output] = made
