"""Export of convolutions and matmuls, which may compute in INT8, with BatchNorm and biases folded into them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from act_pipeline.graph.op_types import DYNAMIC
from act_pipeline.onnx_export.float_ops.rules import CannotLower, channels_first
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import TRANSPOSED_CONVOLUTIONS, Op, QuantizedTensor, Source


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
        if min(sizes) < 0:
            raise CannotLower(f"its padding is SAME and its input size {list(sizes)} open")
        return same_padding(sizes, kernel, list(op.attrs["strides"]), dilations)
    given = list(op.attrs["paddings"])
    if len(given) == 2:
        return [given[0], given[1], given[0], given[1]]
    return [given[0], given[2], given[1], given[3]]


def convolution(build: GraphBuilder, op: Op, followers: list[Op]) -> None:
    """Add a Conv or a ConvTranspose with BatchNorm and bias folded into it.

    The fold does not change the integers' magnitudes: ``gamma / sigma`` becomes a factor of the output channel's weight
    scale, and where it is negative, the signs of the integers are inverted. The bias stays float.

    Args:
        build: the graph to extend.
        op: the convolution; its ``Filter`` is [out, in / groups, H, W], of a transposed one [in, out / groups, H, W].
        followers: the BatchNorm and the addition of a constant for each channel after the convolution, in order; each
            is the only reader of the result before it.
    """
    channels_first(op)
    filter_name, groups = op.input("Filter"), int(op.attrs["groups"])
    transposed = op.type in TRANSPOSED_CONVOLUTIONS
    channels = output_channels(build.shapes[filter_name], op)
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
    inputs = [build.get(op.input("Input")) if values is None else build.dequantized(values, channel_axis=1)]
    inputs.append(_filter(build, op, factor * (1 if values is None else build.divisor(values))))
    shift = values.shift if values is not None else 0.0
    if shift:
        bias = bias - shift * factor * _sums_of_weights(build.quantized[filter_name], channels)
    if followers or "Bias" in op.inputs or shift:
        inputs.append(build.initializer(bias.astype(np.float32), f"{filter_name}.bias"))
    kernel, sizes = list(build.shapes[filter_name][2:]), build.shapes[op.input("Input")][2:]
    # Paddle's padding algorithm SAME also sets the dilations to 1.
    dilations = [1, 1] if op.attrs.get("padding_algorithm") == "SAME" else list(op.attrs["dilations"])
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": list(op.attrs["strides"]),
        "dilations": dilations,
        "group": groups,
        "pads": pads(op, sizes, kernel, dilations),
    }
    if transposed:
        attrs["output_padding"] = _output_padding(op, sizes, attrs)
    made = build.node("ConvTranspose" if transposed else "Conv", inputs, op.output, **attrs)
    for name in (op.output, *(follower.output for follower in followers)):
        build.values[name] = made


def readers_of(source: Source) -> dict[str, list[Op | None]]:
    """Return tensor name -> the ops that read it; None stands for a Q/DQ pair or an output of the graph."""
    readers: dict[str, list[Op | None]] = {}
    for op in source.ops:
        for name in (name for names in op.inputs.values() for name in names):
            readers.setdefault(name, []).append(op)
    for tensor in source.quantized.values():
        readers.setdefault(tensor.source, []).append(None)
    for name in source.outputs:
        readers.setdefault(name, []).append(None)
    return readers


def followers_of(op: Op, source: Source, readers: dict[str, list[Op | None]]) -> list[Op]:
    """Return the BatchNorm and the bias addition after a convolution, each the only reader of the result before it."""
    found: list[Op] = []
    name, filter_name = op.output, op.input("Filter")
    tensor, shape = source.quantized.get(filter_name), source.shapes[filter_name]
    if tensor is not None and tensor.weight is not None:
        takes_factors = scales_by_channel(op, shape)
    else:
        takes_factors = filter_name in source.constants
    while True:
        reading = readers.get(name, [])
        follower = reading[0] if len(reading) == 1 else None
        if follower is None:
            return found
        if follower.type == "elementwise_add":
            bias = source.constants.get(follower.inputs["Y"][0])
            channels = output_channels(shape, op)
            per_channel = bias is not None and (
                (bias.shape == (channels,) and follower.attrs.get("axis") == 1) or bias.shape == (1, channels, 1, 1)
            )
            if not per_channel or follower.input("X") != name:
                return found
        elif follower.type != "batch_norm" or not takes_factors:
            return found
        found.append(follower)
        name = follower.output


def _sums_of_weights(filter_values: QuantizedTensor, channels: int) -> np.ndarray:
    """Return the sum of the weights of each output channel of a convolution, float64 [channels]."""
    assert filter_values.weight is not None
    sums = filter_values.weight.reshape(channels, -1).sum(axis=1, dtype=np.int64)
    return sums * filter_values.scale.astype(np.float64)


def output_channels(filter_shape: tuple[int, ...], op: Op) -> int:
    """Return the number of output channels of a convolution.

    Args:
        filter_shape: shape of its ``Filter``, [out, in / groups, H, W], of a transposed one [in, out / groups, H, W].
        op: the convolution.
    """
    if op.type in TRANSPOSED_CONVOLUTIONS:
        return filter_shape[1] * int(op.attrs["groups"])
    return filter_shape[0]


def scales_by_channel(op: Op, filter_shape: tuple[int, ...]) -> bool:
    """Return whether each output channel of a convolution has a weight scale of its own when it is quantized.

    The channels of different groups of a transposed convolution share scales, unless each group has one channel.

    Args:
        op: the convolution.
        filter_shape: shape of its ``Filter``.
    """
    return op.type not in TRANSPOSED_CONVOLUTIONS or int(op.attrs["groups"]) == 1 or filter_shape[1:2] == (1,)


def _filter(build: GraphBuilder, op: Op, factor: np.ndarray) -> str:
    """Return the ONNX name of the weights of a convolution times a factor for each output channel."""
    name = op.input("Filter")
    quantized, groups = build.quantized.get(name), int(op.attrs["groups"])
    weight = quantized.weight if quantized is not None else None
    if quantized is not None and weight is not None:
        if np.all(factor == 1):
            return build.dequantized(quantized)
        if not scales_by_channel(op, weight.shape):  # then the factor is the scale of the input
            scale = quantized.scale.astype(np.float64) * factor[0]
            return build.dequantized(replace(quantized, scale=scale.astype(np.float32)))
        axis = 1 if op.type in TRANSPOSED_CONVOLUTIONS and groups == 1 else 0
        if quantized.scale.size == 1:
            quantized = replace(quantized, scale=quantized.scale.reshape(()))
        return build.dequantized(_scaled(quantized, weight, factor, axis))
    if np.all(factor == 1) and name not in build.constants:
        return build.get(name)
    value = build.constants[name]
    if op.type in TRANSPOSED_CONVOLUTIONS:
        inside, outside, *kernel = value.shape
        parts = value.reshape(groups, inside // groups, outside, *kernel)
        scaled = (parts * factor.reshape(groups, 1, outside, 1, 1)).reshape(value.shape)
    else:
        scaled = value * factor[:, None, None, None]
    return build.initializer(scaled.astype(value.dtype), name)


def _output_padding(op: Op, sizes: tuple[int, ...], attrs: dict[str, Any]) -> list[int]:
    wanted = [int(size) for size in op.attrs.get("output_size") or ()]
    if not wanted:
        return [int(size) for size in op.attrs.get("output_padding") or (0, 0)]
    if min(sizes) < 0:
        raise CannotLower(f"it has an output_size and the open input size {list(sizes)}")
    edges = attrs["pads"]
    extents = [step * (edge - 1) + 1 for step, edge in zip(attrs["dilations"], attrs["kernel_shape"])]
    least = [(size - 1) * stride + extent - edges[axis] - edges[axis + 2]
             for axis, (size, stride, extent) in enumerate(zip(sizes, attrs["strides"], extents))]  # fmt: skip
    return [size - smallest for size, smallest in zip(wanted, least)]


def _scaled(tensor: QuantizedTensor, weight: np.ndarray, factor: np.ndarray, axis: int) -> QuantizedTensor:
    shape = [1] * weight.ndim
    shape[axis] = -1
    scale = np.broadcast_to(tensor.scale, factor.shape) * np.abs(factor)
    sign = np.where(factor < 0, -1, 1).reshape(shape)
    # -(-128) does not fit into int8; Paddle's weights are within [-127, 127], so the clip changes nothing.
    weight = np.clip(weight.astype(np.int16) * sign, -128, 127).astype(np.int8)
    # A scale of zero (a channel whose BatchNorm gamma is zero) is rejected by runtimes.
    off = scale == 0
    weight = np.where(off.reshape(shape), np.int8(0), weight)
    return replace(tensor, scale=np.where(off, 1, scale).astype(np.float32), axis=axis, weight=weight)


def matmul(build: GraphBuilder, op: Op) -> None:
    """Add a MatMul; a transposed operand is transposed before it is rounded.

    Args:
        build: the graph to extend.
        op: one of :data:`act_pipeline.onnx_export.program.PRODUCTS`.
    """
    if op.type == "mul" and not _is_plain(build, op):
        _flattened_product(build, op)
        return
    if rounds_dynamically(build, op):
        build.values[op.output] = _times_alpha(build, op, _dynamic_product(build, op))
        return
    operands = []
    tensors = [build.quantized.get(op.input(slot)) for slot in ("X", "Y")]
    taken_over = [np.float32(1) if tensor is None else build.divisor(tensor) for tensor in tensors]
    for index, slot in enumerate(("X", "Y")):
        name, tensor = op.input(slot), tensors[index]
        turn = _transposes(op, slot) and len(build.shapes[tensor.source if tensor is not None else name]) > 1
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
        last = build.shapes[op.output][-1] if build.shapes[op.output] else 1
        factor = np.full(max(last, 1), taken_over[0] * taken_over[1], np.float32)
        if factor[0] != 1:
            made = build.node("Mul", [made, build.initializer(factor, f"{op.output}.scale")], op.output)
    build.values[op.output] = _times_alpha(build, op, made)


def _times_alpha(build: GraphBuilder, op: Op, made: str) -> str:
    alpha = float(op.attrs.get("alpha", 1.0))
    return made if alpha == 1 else build.node("Mul", [made, build.scalar(alpha, op.output)], op.output)


def _transposes(op: Op, slot: str) -> bool:
    return bool(op.attrs.get(f"trans_{slot.lower()}") or op.attrs.get(f"transpose_{slot}"))


def rounds_dynamically(build: GraphBuilder, op: Op) -> bool:
    """Return whether a product is marked to round its float left input by that tensor's own range.

    Its right input has to be an INT8 matrix with one scale, or with one for each output column.
    """
    if op.type != "matmul_v2" or not op.attrs.get(DYNAMIC) or op.input("X") in build.quantized:
        return False
    tensor = build.quantized.get(op.input("Y"))
    if tensor is None or tensor.weight is None or tensor.weight.ndim != 2:
        return False
    columns = 0 if _transposes(op, "Y") else 1
    return tensor.scale.ndim == 0 or tensor.axis % 2 == columns


def _dynamic_product(build: GraphBuilder, op: Op) -> str:
    """Return the name of ``(q - z) @ w * (s * t)``: ``q, s, z`` by DynamicQuantizeLinear, ``t`` the scales of ``w``.

    q is uint8, and z is subtracted by MatMulInteger, in int32.
    """
    name, tensor = op.input("X"), build.quantized[op.input("Y")]
    assert tensor.weight is not None
    turn = _transposes(op, "X") and len(build.shapes[name]) > 1
    rounded, step, zero = build.dynamically_quantized(name, turn)
    integers = tensor.weight.T if _transposes(op, "Y") else tensor.weight
    weight = build.initializer(integers, f"{tensor.source}.int8")
    sums = build.node("MatMulInteger", [rounded, weight, zero], f"{op.output}.int32")
    scale = build.initializer(tensor.scale, f"{tensor.source}.scale")
    factors = build.node("Mul", [step, scale], f"{op.output}.scale")
    return str(build.node("Mul", [build.cast(sums, np.float32, f"{op.output}.sums"), factors], op.output))


def _is_plain(build: GraphBuilder, op: Op) -> bool:
    """Return whether the legacy op ``mul`` flattens nothing."""
    ranks = [len(build.shapes[op.input(slot)]) for slot in ("X", "Y")]
    split = [int(op.attrs.get(key, 1)) for key in ("x_num_col_dims", "y_num_col_dims")]
    return split[0] == ranks[0] - 1 and ranks[1] == 2 and split[1] == 1


def _flattened_product(build: GraphBuilder, op: Op) -> None:
    """Add the legacy op ``mul``, which flattens the last axes of X and the first and the last ones of Y."""
    lead, split = int(op.attrs.get("x_num_col_dims", 1)), int(op.attrs.get("y_num_col_dims", 1))
    shape = [int(size) for size in build.shapes[op.input("Y")]]
    left = build.reshape(build.get(op.input("X")), *[0] * lead, -1)
    right = build.reshape(build.get(op.input("Y")), math.prod(shape[:split]), -1)
    made = build.node("MatMul", [left, right], op.output)
    build.values[op.output] = build.reshape(made, *[0] * lead, *shape[split:], hint=op.output)
