"""Rules of convolutions, matrix products and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule
from act_pipeline.importers.onnx.source import Node

_SPATIAL = 2


def _pair(node: Node, name: str, default: int) -> list[int]:
    """Return an attribute of height and width.

    Raises:
        CannotImport: it does not have two numbers.
    """
    found = [int(each) for each in node.attrs.get(name, [default] * _SPATIAL)]
    if len(found) != _SPATIAL:
        raise CannotImport(f"its attribute {name} is {found}, expected height and width")
    return found


def _require_images(build: Build, node: Node) -> tuple[int, ...]:
    """Return the shape of the first input with the fixed batch.

    Raises:
        CannotImport: it is not [N, C, H, W].
    """
    shape = build.shape(node.inputs[0])
    if len(shape) != 2 + _SPATIAL:
        raise CannotImport(f"its input has the shape {list(shape)}, expected [N, C, H, W]")
    return shape


def _pads(node: Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]):
    """Return what is added at top, left, bottom and right, also where ``auto_pad`` says it.

    Raises:
        CannotImport: ``auto_pad`` has another value, or the padding is negative.
    """
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        found = [int(each) for each in node.attrs.get("pads", [0] * 2 * _SPATIAL)]
        if len(found) != 2 * _SPATIAL or min(found) < 0:
            raise CannotImport(f"its pads are {found}, expected four that are not negative")
        return found
    if mode == "VALID":
        return [0] * 2 * _SPATIAL
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise CannotImport(f"its auto_pad is {mode!r}, expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    totals = [
        max((math.ceil(edge / stride) - 1) * stride + (width - 1) * dilation + 1 - edge, 0)
        for edge, width, stride, dilation in zip(size, kernel, strides, dilations)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def _paddings(pads: Sequence[int]) -> list[int]:
    """Return ONNX's padding (top, left, bottom, right) as Paddle's: two numbers, or top, bottom, left, right."""
    top, left, bottom, right = pads
    return [top, left] if (top, left) == (bottom, right) else [top, bottom, left, right]


def _add_bias(build: Build, node: Node, result: Any, channels: int) -> Any:
    import paddle

    if not node.has(2):
        return result
    name = node.inputs[2]
    bias = build.constant(name, "bias")
    if bias.size != channels:
        raise CannotImport(f"its bias has the shape {list(bias.shape)}, expected {channels} values")
    return paddle.add(result, build.parameter(name, bias.reshape(1, channels, 1, 1), "bias"))


def _weight(build: Build, node: Node) -> np.ndarray:
    weight = build.constant(node.inputs[1], "weight")
    if weight.ndim != 2 + _SPATIAL or weight.dtype != np.float32:
        raise CannotImport(
            f"its weight is {weight.dtype} {list(weight.shape)}, expected float32 [outputs, inputs, height, width]"
        )
    kernel = list(weight.shape[2:])
    if [int(each) for each in node.attrs.get("kernel_shape", kernel)] != kernel:
        raise CannotImport(f"its kernel_shape is {node.attrs['kernel_shape']}, its weight's is {kernel}")
    return weight


def _convolution(build: Build, node: Node) -> Any:
    import paddle

    weight, shape = _weight(build, node), _require_images(build, node)
    strides, dilations, groups = _pair(node, "strides", 1), _pair(node, "dilations", 1), int(node.attrs.get("group", 1))
    if groups < 1 or shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise CannotImport(f"its weight {list(weight.shape)} in {groups} groups does not fit {shape[1]} channels")
    pads = _pads(node, shape[2:], weight.shape[2:], strides, dilations)
    result = paddle.nn.functional.conv2d(
        build.value(node.inputs[0]),
        build.parameter(node.inputs[1], weight),
        stride=strides,
        padding=_paddings(pads),
        dilation=dilations,
        groups=groups,
    )
    return _add_bias(build, node, result, weight.shape[0])


def _transposed_convolution(build: Build, node: Node) -> Any:
    import paddle

    weight, shape = _weight(build, node), _require_images(build, node)
    strides, dilations, groups = _pair(node, "strides", 1), _pair(node, "dilations", 1), int(node.attrs.get("group", 1))
    if groups < 1 or shape[1] != weight.shape[0] or weight.shape[0] % groups:
        raise CannotImport(f"its weight {list(weight.shape)} in {groups} groups does not fit {shape[1]} channels")
    extra = _pair(node, "output_padding", 0)
    full = [
        stride * (edge - 1) + (width - 1) * dilation + 1 + more
        for stride, edge, width, dilation, more in zip(strides, shape[2:], weight.shape[2:], dilations, extra)
    ]
    mode = node.attrs.get("auto_pad", "NOTSET")
    if "output_shape" in node.attrs or mode.startswith("SAME"):
        wanted = [int(each) for each in node.attrs.get("output_shape", [])][-_SPATIAL:] or [
            edge * stride for edge, stride in zip(shape[2:], strides)
        ]
        totals = [have - want for have, want in zip(full, wanted)]
        if min(totals) < 0:
            raise CannotImport(f"its output_shape {wanted} is larger than the {full} that it computes")
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
    else:
        pads = _pads(node, shape[2:], weight.shape[2:], strides, dilations)
    # Without padding, Paddle and ONNX agree; what is too much at the edges is cut off where the padding differs.
    symmetric = pads[:2] == pads[2:]
    result = paddle.nn.functional.conv2d_transpose(
        build.value(node.inputs[0]),
        build.parameter(node.inputs[1], weight),
        stride=strides,
        padding=pads[:2] if symmetric else 0,
        output_padding=extra,
        dilation=dilations,
        groups=groups,
    )
    if not symmetric:
        ends = [have - cut for have, cut in zip(full, pads[2:])]
        result = paddle.slice(result, [2, 3], pads[:2], ends)
    return _add_bias(build, node, result, weight.shape[1] * groups)


def _matmul(build: Build, node: Node) -> Any:
    import paddle

    for name in node.inputs:
        if build.dtype(name) != "float32":
            raise CannotImport(f"its input {name!r} is {build.dtype(name)}, expected float32")
    return paddle.matmul(build.value(node.inputs[0]), build.value(node.inputs[1]))


def _gemm(build: Build, node: Node) -> Any:
    import paddle

    first, second = node.inputs[:2]
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    transpose_first, transpose_second = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))
    scaled = alpha == 1
    if build.is_constant(second):
        # Weights are stored as [inputs, outputs], as Paddle's linear layers have them: quantization takes the columns.
        weight = build.constants[second].T if transpose_second else build.constants[second]
        variant = "_".join(["transposed"] * transpose_second + [f"times_{alpha:g}"] * (alpha != 1))
        weight = build.parameter(second, weight * np.float32(alpha), variant)
        transpose_second, scaled = False, True
    else:
        weight = build.value(second)
    result = paddle.matmul(build.value(first), weight, transpose_x=transpose_first, transpose_y=transpose_second)
    if not scaled:
        result = paddle.scale(result, scale=alpha)
    if not node.has(2) or beta == 0:
        return result
    bias = node.inputs[2]
    if beta != 1 and build.is_constant(bias):
        return paddle.add(result, build.parameter(bias, build.constants[bias] * np.float32(beta), f"times_{beta:g}"))
    added = build.value(bias)
    return paddle.add(result, added if beta == 1 else paddle.scale(added, scale=beta))


def _pool_geometry(build: Build, node: Node) -> tuple[list[int], list[int], list[int], bool]:
    """Return kernel, strides, padding (top, left, bottom, right) and whether the output size is rounded up."""
    shape = _require_images(build, node)
    if any(each != 1 for each in _pair(node, "dilations", 1)):
        raise CannotImport(f"its dilations are {node.attrs['dilations']}, expected 1")
    if "kernel_shape" not in node.attrs:
        raise CannotImport("its kernel_shape is missing")
    kernel, strides = _pair(node, "kernel_shape", 1), _pair(node, "strides", 1)
    pads = _pads(node, shape[2:], kernel, strides, [1, 1])
    spans = [
        (edge + pads[axis] + pads[axis + _SPATIAL] - width, stride, edge + pads[axis])
        for axis, (edge, width, stride) in enumerate(zip(shape[2:], kernel, strides))
    ]
    ceil = bool(node.attrs.get("ceil_mode", 0)) and any(span % stride for span, stride, _ in spans)
    # A last window that would begin in the padding behind the image is left out, in ONNX as in PyTorch.
    dropped = [-(-span // stride) * stride >= end and span % stride for span, stride, end in spans]
    if ceil and any(dropped):
        kept = [not drop and span % stride for drop, (span, stride, _) in zip(dropped, spans)]
        if any(kept):
            raise CannotImport("ceil_mode adds a window in one direction and none in the other")
        ceil = False
    return kernel, strides, pads, ceil


def _max_pool(build: Build, node: Node) -> Any:
    import paddle

    build.refuse_outputs(node, 1)
    kernel, strides, pads, ceil = _pool_geometry(build, node)
    return paddle.nn.functional.max_pool2d(
        build.value(node.inputs[0]), kernel, strides, _paddings(pads), ceil_mode=ceil
    )


def _average_pool(build: Build, node: Node) -> Any:
    import paddle

    kernel, strides, pads, ceil = _pool_geometry(build, node)
    counted = bool(node.attrs.get("count_include_pad", 0))
    value = build.value(node.inputs[0])
    if counted and any(pads):
        value, pads = paddle.nn.functional.pad(value, [pads[1], pads[3], pads[0], pads[2]]), [0, 0, 0, 0]
    return paddle.nn.functional.avg_pool2d(value, kernel, strides, _paddings(pads), ceil_mode=ceil, exclusive=True)


def _global_average_pool(build: Build, node: Node) -> Any:
    import paddle

    _require_images(build, node)
    return paddle.nn.functional.adaptive_avg_pool2d(build.value(node.inputs[0]), 1)


def _global_max_pool(build: Build, node: Node) -> Any:
    import paddle

    _require_images(build, node)
    return paddle.max(build.value(node.inputs[0]), axis=[2, 3], keepdim=True)


RULES: dict[str, Rule] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
}
