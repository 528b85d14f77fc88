"""Rules that sample images at other places: Resize, Upsample, GridSample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule
from act_pipeline.importers.onnx.source import Node


def _resize(build: Build, node: Node) -> Any:
    shape = build.shape(node.inputs[0])
    if build.opset < 11:  # inputs: X, scales; the coordinates are those of `asymmetric`
        attrs = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", **node.attrs}
        sizes, scales = None, _scales(build, node, 1)
    else:
        attrs = dict(node.attrs)
        sizes, scales = build.ints(node, 3, "sizes") if node.has(3) else None, _scales(build, node, 2)
    if attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise CannotImport(f"its keep_aspect_ratio_policy is {attrs['keep_aspect_ratio_policy']!r}, expected stretch")
    given = sizes if sizes is not None else scales
    if given is None:
        raise CannotImport("it has neither sizes nor scales")
    axes = [int(axis) % len(shape) for axis in attrs.get("axes", range(len(shape)))]
    if len(given) != len(axes):
        raise CannotImport(f"it has {len(given)} sizes or scales for {len(axes)} dimensions")
    target = list(shape)
    factors = [1.0] * len(shape)
    for axis, number in zip(axes, given):
        target[axis] = int(number) if sizes is not None else math.floor(shape[axis] * number)
        factors[axis] = target[axis] / shape[axis] if sizes is not None else float(number)
    return _sampled(build, node, attrs, target, factors)


def _scales(build: Build, node: Node, index: int) -> Sequence[float] | None:
    if "scales" in node.attrs:
        return [float(each) for each in node.attrs["scales"]]
    if not node.has(index):
        return None
    values = build.constant(node.inputs[index], "scales")
    return [float(each) for each in values.reshape(-1)] or None


def _sampled(build: Build, node: Node, attrs: dict[str, Any], target: Sequence[int], factors: Sequence[float]) -> Any:
    """Resize to ``target``; refuse the coordinates that Paddle's interpolation does not have."""
    import paddle

    shape, value = build.shape(node.inputs[0]), build.value(node.inputs[0])
    if len(shape) != 4 or list(target[:2]) != list(shape[:2]):
        raise CannotImport(f"it resizes {list(shape)} to {list(target)}, expected [N, C, H, W] with the same N and C")
    if min(target) < 1:
        raise CannotImport(f"it resizes {list(shape)} to {list(target)}, expected sizes of at least 1")
    mode = attrs.get("mode", "nearest")
    coordinates = attrs.get("coordinate_transformation_mode", "half_pixel")
    size = list(target[2:])
    if mode == "nearest":
        return _nearest(build, value, attrs, coordinates, before=shape[2:], after=size, factors=factors[2:])
    if list(target) == list(shape) and coordinates != "tf_crop_and_resize":
        return value
    if mode not in ("linear", "cubic"):
        raise CannotImport(f"its mode is {mode!r}, expected nearest, linear or cubic")
    if attrs.get("antialias", 0) and any(out < edge for out, edge in zip(size, shape[2:])):
        raise CannotImport("its antialias is 1, expected 0: Paddle has no filter for making images smaller")
    exact = all(math.isclose(edge * factor, out) for edge, factor, out in zip(shape[2:], factors[2:], size))
    if coordinates == "pytorch_half_pixel" and min(size) > 1:
        coordinates = "half_pixel"
    if coordinates == "half_pixel_symmetric" and exact:
        coordinates = "half_pixel"
    allowed = ("half_pixel", "align_corners", "asymmetric") if mode == "linear" else ("half_pixel", "align_corners")
    if coordinates not in allowed:
        raise CannotImport(
            f"its coordinate_transformation_mode is {coordinates!r} with the mode {mode}, expected one of "
            f"{', '.join(allowed)}"
        )
    if not exact and coordinates != "align_corners":
        raise CannotImport(f"its scales {list(factors[2:])} do not give a whole number of pixels from {shape[2:]}")
    if mode == "cubic":
        if not math.isclose(attrs.get("cubic_coeff_a", -0.75), -0.75) or attrs.get("exclude_outside", 0):
            raise CannotImport("its cubic_coeff_a or exclude_outside is not the default, -0.75 and 0")
    return paddle.nn.functional.interpolate(
        value,
        size=size,
        mode="bilinear" if mode == "linear" else "bicubic",
        align_corners=coordinates == "align_corners",
        align_mode=1 if coordinates == "asymmetric" else 0,
    )


def _nearest(
    build: Build,
    value: Any,
    attrs: dict[str, Any],
    coordinates: str,
    *,
    before: Sequence[int],
    after: Sequence[int],
    factors: Sequence[float],
) -> Any:
    """Resize to the nearest pixels: with Paddle's op where it takes the same ones, else by their indices."""
    import paddle

    rounding = attrs.get("nearest_mode", "round_prefer_floor")
    chosen = [
        _chosen_pixels(coordinates, rounding, edge, out, factor) for edge, out, factor in zip(before, after, factors)
    ]
    of_paddle = [np.arange(out) * edge // out for edge, out in zip(before, after)]
    if all(np.array_equal(ours, theirs) for ours, theirs in zip(chosen, of_paddle)):
        return paddle.nn.functional.interpolate(value, size=list(after), mode="nearest")
    for axis, indices in zip((2, 3), chosen):
        if not np.array_equal(indices, np.arange(before[axis - 2])):
            value = paddle.gather(value, paddle.assign(indices.astype(np.int64)), axis=axis)
    return value


def _chosen_pixels(coordinates: str, rounding: str, edge: int, out: int, factor: float) -> np.ndarray:
    """Return the index of the input pixel for each output pixel, as ONNX defines Resize.

    Args:
        coordinates: ``coordinate_transformation_mode``.
        rounding: ``nearest_mode``.
        edge: pixels of the input in this direction.
        out: pixels of the output.
        factor: the scale.

    Returns:
        int64 [out].
    """
    place = np.arange(out, dtype=np.float64)
    if coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and out > 1):
        place = (place + 0.5) / factor - 0.5
    elif coordinates == "pytorch_half_pixel":
        place = np.zeros(out)
    elif coordinates == "align_corners":
        place = place * (edge - 1) / (out - 1) if out > 1 else np.zeros(out)
    elif coordinates == "asymmetric":
        place = place / factor
    elif coordinates == "tf_half_pixel_for_nn":
        place = (place + 0.5) / factor
    elif coordinates == "half_pixel_symmetric":
        offset = edge / 2 * (1 - out / (factor * edge))
        place = offset + (place + 0.5) / factor - 0.5
    else:
        raise CannotImport(f"its coordinate_transformation_mode is {coordinates!r}, which has no counterpart")
    rounded = {
        "round_prefer_floor": np.ceil(place - 0.5),
        "round_prefer_ceil": np.floor(place + 0.5),
        "floor": np.floor(place),
        "ceil": np.ceil(place),
    }.get(rounding)
    if rounded is None:
        raise CannotImport(f"its nearest_mode is {rounding!r}, which has no counterpart")
    return np.clip(rounded, 0, edge - 1).astype(np.int64)


def _upsample(build: Build, node: Node) -> Any:
    scales = _scales(build, node, 1)
    shape = build.shape(node.inputs[0])
    if scales is None or len(scales) != len(shape):
        raise CannotImport(f"its scales are {scales}, expected {len(shape)}")
    attrs = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", **node.attrs}
    return _sampled(build, node, attrs, [math.floor(size * factor) for size, factor in zip(shape, scales)], scales)


def _grid_sample(build: Build, node: Node) -> Any:
    import paddle

    mode = {"linear": "bilinear"}.get(node.attrs.get("mode", "bilinear"), node.attrs.get("mode", "bilinear"))
    padding = node.attrs.get("padding_mode", "zeros")
    if mode not in ("bilinear", "nearest") or padding not in ("zeros", "border", "reflection"):
        raise CannotImport(f"its mode is {mode!r} and its padding_mode {padding!r}, expected bilinear or nearest")
    if build.rank(node.inputs[0]) != 4:
        raise CannotImport(f"its input has {build.rank(node.inputs[0])} dimensions, expected 4")
    return paddle.nn.functional.grid_sample(
        build.value(node.inputs[0]),
        build.value(node.inputs[1]),
        mode=mode,
        padding_mode=padding,
        align_corners=bool(node.attrs.get("align_corners", 0)),
    )


RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _upsample, "GridSample": _grid_sample}
