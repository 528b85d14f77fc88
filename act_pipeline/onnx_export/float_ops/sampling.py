"""Export rules of pooling, interpolation and sampling of feature maps."""

from __future__ import annotations

from typing import Any

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import (
    CannotLower,
    Rule,
    channels_first,
    fixed_shape,
    known_integers,
    vector,
)
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op
from act_pipeline.onnx_export.quantized_ops import pads

_INTERPOLATIONS = {"nearest_interp_v2": "nearest", "bilinear_interp_v2": "linear", "bicubic_interp_v2": "cubic"}


def _pool(build: GraphBuilder, op: Op) -> str:
    channels_first(op)
    kernel = [int(size) for size in op.attrs["ksize"]]
    maximum = op.attrs.get("pooling_type", "max") == "max"
    if op.attrs.get("global_pooling") or (op.attrs.get("adaptive") and set(kernel) == {1}):
        kind = "GlobalMaxPool" if maximum else "GlobalAveragePool"
        return build.node(kind, [build.get(op.input("X"))], op.output)
    if op.attrs.get("adaptive"):
        return _adaptive_pool(build, op, kernel, maximum)
    return _windows(build, op, kernel, maximum)


def _windows(build: GraphBuilder, op: Op, kernel: list[int], maximum: bool) -> str:
    value, sizes, strides = build.get(op.input("X")), build.shapes[op.input("X")][2:], list(op.attrs["strides"])
    edges = pads(op, sizes, kernel, [1, 1])
    ceil = bool(op.attrs.get("ceil_mode")) and op.attrs.get("padding_algorithm") != "SAME"
    includes = not maximum and not op.attrs.get("exclusive", True)
    if ceil and min(sizes) > 0:
        # Runtimes differ in the last window of ceil_mode. With the padding that it needs there is nothing to round up.
        missing = []
        for axis in range(2):
            span = sizes[axis] + edges[axis] + edges[axis + 2] - kernel[axis]
            missing.append(-(-span // strides[axis]) * strides[axis] - span)
        if includes and any(missing):  # the average counts the padding of the program, but not the missing elements
            around = build.ints(0, 0, *edges[:2], 0, 0, *edges[2:])
            value = build.node("Pad", [value, around, build.scalar(0, op.input("X"))])
            edges, includes = [0, 0, 0, 0], False
        edges = [*edges[:2], edges[2] + missing[0], edges[3] + missing[1]]
        ceil = False
    attrs: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": edges, "ceil_mode": int(ceil)}
    if not maximum:
        attrs["count_include_pad"] = int(includes)
    return build.node("MaxPool" if maximum else "AveragePool", [value], op.output, **attrs)


def _adaptive_pool(build: GraphBuilder, op: Op, counts: list[int], maximum: bool) -> str:
    """Pool to a given size: equal windows where it divides the input, otherwise the windows of each axis by slices."""
    sizes = fixed_shape(build, op.input("X"), 2)
    value = build.get(op.input("X"))
    if all(size % count == 0 for size, count in zip(sizes, counts)):
        kernel = [size // count for size, count in zip(sizes, counts)]
        return build.node(
            "MaxPool" if maximum else "AveragePool", [value], op.output, kernel_shape=kernel, strides=kernel
        )
    kind = "ReduceMax" if maximum else "ReduceMean"
    for axis, (size, count) in enumerate(zip(sizes, counts), 2):
        parts = []
        for window in range(count):
            start, end = window * size // count, -(-(window + 1) * size // count)
            part = build.node("Slice", [value, build.ints(start), build.ints(end), build.ints(axis)])
            parts.append(build.reduce(kind, part, [axis], True))
        value = build.node("Concat", parts, op.output, axis=axis)
    return value


def _interpolate(build: GraphBuilder, op: Op) -> str:
    channels_first(op)
    name, mode = op.input("X"), _INTERPOLATIONS[op.type]
    align = bool(op.attrs.get("align_corners"))
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "align_corners" if align else "half_pixel"}
    if mode == "nearest":
        attrs["nearest_mode"] = "round_prefer_ceil" if align else "floor"
    if mode == "cubic":
        attrs["cubic_coeff_a"] = -0.75
    elif not align and (mode == "nearest" or int(op.attrs.get("align_mode", 1)) == 1):
        attrs["coordinate_transformation_mode"] = "asymmetric"
    return build.node("Resize", [build.get(name), "", *_target(build, op)], op.output, **attrs)


def _target(build: GraphBuilder, op: Op) -> list[str]:
    """Return the inputs ``scales`` and ``sizes`` of a Resize, of which one is empty or absent."""
    name = op.input("X")
    slot = next((slot for slot in ("SizeTensor", "OutSize") if slot in op.inputs), None)
    wanted = None
    if slot is not None:
        wanted = known_integers(build, op.inputs[slot])
        if wanted is None:
            return ["", _sizes(build, name, vector(build, op.inputs[slot]))]
    elif "Scale" in op.inputs and op.input("Scale") not in build.constants:
        factors = build.cast(build.reshape(build.get(op.input("Scale")), -1), np.float32)
        if build.shapes[op.input("Scale")] in ((), (1,)):
            factors = build.node("Concat", [factors, factors], axis=0)
        return [build.node("Concat", [build.initializer(np.ones(2, np.float32)), factors], axis=0)]
    else:
        given = build.constants[op.input("Scale")].reshape(-1) if "Scale" in op.inputs else op.attrs.get("scale")
        scale = [float(factor) for factor in (given if given is not None else ())]
        if scale and min(scale) > 0:
            return [build.initializer(np.array([1, 1, scale[0], scale[-1]], np.float32))]
        wanted = [int(op.attrs["out_h"]), int(op.attrs["out_w"])]
    sizes = build.shapes[name][2:]
    if min(sizes) > 0 and all(size % before == 0 for size, before in zip(wanted, sizes)):
        multiples = [size // before for size, before in zip(wanted, sizes)]
        return [build.initializer(np.array([1, 1, *multiples], np.float32))]
    # As a float32 factor, a size that is no multiple could be rounded to one less.
    return ["", _sizes(build, name, build.ints(*wanted))]


def _sizes(build: GraphBuilder, name: str, wanted: str) -> str:
    """Return the sizes of all axes, where the first two are those of a tensor."""
    shape = build.node("Shape", [build.get(name)])
    return build.node("Concat", [build.node("Slice", [shape, build.ints(0), build.ints(2)]), wanted], axis=0)


def _grid_sample(build: GraphBuilder, op: Op) -> str:
    if len(build.shapes[op.input("X")]) != 4 and build.opset < 20:
        raise CannotLower("it samples volumes, expected feature maps, or --opset 20")
    mode = str(op.attrs.get("mode", "bilinear"))
    if mode == "bilinear" and build.opset >= 20:
        mode = "linear"
    return build.node(
        "GridSample", [build.get(op.input("X")), build.get(op.input("Grid"))], op.output,
        mode=mode, padding_mode=op.attrs.get("padding_mode", "zeros"),
        align_corners=int(op.attrs.get("align_corners", True)),
    )  # fmt: skip


def _pixel_shuffle(build: GraphBuilder, op: Op) -> str:
    channels_first(op)
    return build.node(
        "DepthToSpace", [build.get(op.input("X"))], op.output, blocksize=int(op.attrs["upscale_factor"]), mode="CRD"
    )


RULES: dict[str, Rule] = {
    **{kind: _interpolate for kind in _INTERPOLATIONS},
    "pool2d": _pool,
    "max_pool2d_with_index": _pool,
    "grid_sampler": _grid_sample,
    "pixel_shuffle": _pixel_shuffle,
}
