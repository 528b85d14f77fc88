"""Rules that move values without computing: reshapes, transposes, slices, joins, padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule, axis_of, open_axis
from act_pipeline.importers.onnx.source import Node


def _reshape(build: Build, node: Node) -> Any:
    before = build.shape(node.inputs[0])
    asked = build.ints(node, 1, "shape") or []
    if node.attrs.get("allowzero", 0) and 0 in asked:
        raise CannotImport("its result is empty")
    if any(size == 0 and index >= len(before) for index, size in enumerate(asked)):
        raise CannotImport(f"its shape {asked} copies a dimension that its input {list(before)} does not have")
    after = [before[index] if size == 0 else size for index, size in enumerate(asked)]
    if after.count(-1) > 1 or min(after, default=1) < -1:
        raise CannotImport(f"its shape is {asked}, expected at most one -1")
    known = math.prod(size for size in after if size != -1)
    after = [math.prod(before) // max(known, 1) if size == -1 else size for size in after]
    if math.prod(after) != math.prod(before):
        raise CannotImport(f"its shape {asked} does not fit its input {list(before)}")
    return build.reshape(build.value(node.inputs[0]), before, after)


def _flatten(build: Build, node: Node) -> Any:
    before = build.shape(node.inputs[0])
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(before) if axis < 0 else axis
    after = [math.prod(before[:axis]), math.prod(before[axis:])]
    return build.reshape(build.value(node.inputs[0]), before, after)


def _unsqueeze(build: Build, node: Node) -> Any:
    import paddle

    axes = build.ints(node, 1, "axes")
    if axes is None:
        raise CannotImport("its axes are missing")
    rank = build.rank(node.inputs[0]) + len(axes)
    axes = sorted(axis_of(axis, rank) for axis in axes)  # Paddle inserts them one after the other
    if len(set(axes)) != len(axes):
        raise CannotImport(f"its axes {axes} name a dimension twice")
    return paddle.unsqueeze(build.value(node.inputs[0]), axes)


def _squeeze(build: Build, node: Node) -> Any:
    before = build.shape(node.inputs[0])
    axes = build.ints(node, 1, "axes")
    if axes is None:
        axes = [index for index, size in enumerate(before) if size == 1]
    axes = [axis_of(axis, len(before)) for axis in axes]
    if any(before[axis] != 1 for axis in axes):
        raise CannotImport(f"it removes the dimensions {axes} of {list(before)}, expected dimensions of 1")
    value = build.value(node.inputs[0])
    if open_axis(value) in axes:
        raise CannotImport("it removes the open batch")
    # A reshape: PaddleSlim 2.6.0 restores no XShape output of squeeze2.
    return build.reshape(value, before, [size for index, size in enumerate(before) if index not in axes])


def _transpose(build: Build, node: Node) -> Any:
    import paddle

    rank = build.rank(node.inputs[0])
    order = [int(axis) for axis in node.attrs.get("perm", range(rank)[::-1])]
    if sorted(order) != list(range(rank)):
        raise CannotImport(f"its perm is {order}, expected the {rank} dimensions of its input")
    return paddle.transpose(build.value(node.inputs[0]), order)


def _concat(build: Build, node: Node) -> Any:
    import paddle

    values = build.values(node)
    axis = axis_of(int(node.attrs.get("axis", 0)), build.rank(node.inputs[0]))
    opened = next((value for value in values if open_axis(value) not in (None, axis)), None)
    if opened is not None:
        values = [build.with_batch_of(value, opened) for value in values]
    return values[0] if len(values) == 1 else paddle.concat(values, axis=axis)


def _split(build: Build, node: Node) -> Any:
    import paddle

    axis = axis_of(int(node.attrs.get("axis", 0)), build.rank(node.inputs[0]))
    size, count = build.shape(node.inputs[0])[axis], len(node.outputs)
    parts = build.ints(node, 1, "split")
    if parts is None:
        chunk = -(-size // count)
        parts = [min(chunk, size - index * chunk) for index in range(count)]
    if sum(parts) != size or len(parts) != count or min(parts) < 1:
        raise CannotImport(f"it splits {size} into {parts}, expected {count} positive sizes that add up to it")
    value = build.value(node.inputs[0])
    if open_axis(value) == axis:
        raise CannotImport("it splits the open batch")
    return [value] if count == 1 else paddle.split(value, parts, axis=axis)


def _slice(build: Build, node: Node) -> Any:
    import paddle

    starts, ends = build.ints(node, 1, "starts"), build.ints(node, 2, "ends")
    if starts is None or ends is None:
        raise CannotImport("its starts or ends are missing")
    shape = build.shape(node.inputs[0])
    axes = [axis_of(axis, len(shape)) for axis in build.ints(node, 3, "axes") or range(len(starts))]
    steps = build.ints(node, 4, "steps") or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise CannotImport(f"its starts {starts}, ends {ends}, axes {axes} and steps {steps} do not fit each other")
    value = build.value(node.inputs[0])
    batch = open_axis(value)
    for axis, start, end, step in zip(axes, starts, ends, steps):
        taken = range(*slice(start, end, step).indices(shape[axis]))
        if len(taken) == shape[axis] and step == 1:
            continue
        if axis == batch:
            raise CannotImport("it slices the open batch")
        if not taken:
            raise CannotImport(f"its result is empty: [{start}:{end}:{step}] of {shape[axis]}")
        first, last = min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1
        if abs(step) == 1:
            value = paddle.slice(value, [axis], [first], [last])
        else:
            value = paddle.strided_slice(value, [axis], [first], [last], [abs(step)])
        if step < 0:  # strided_slice (Paddle 2.6.2) stops before the first element
            value = paddle.flip(value, [axis])
    return value


def _tile(build: Build, node: Node) -> Any:
    import paddle

    repeats = build.ints(node, 1, "repeats") or []
    value = build.value(node.inputs[0])
    batch = open_axis(value)
    if batch is not None and batch < len(repeats) and repeats[batch] != 1 and batch != 0:
        raise CannotImport("it repeats the open batch")
    return value if all(each == 1 for each in repeats) else paddle.tile(value, repeats)


def _expand(build: Build, node: Node) -> Any:
    import paddle

    before = build.shape(node.inputs[0])
    target = list(np.broadcast_shapes(before, tuple(build.ints(node, 1, "shape") or ())))
    value = build.value(node.inputs[0])
    if target == list(before):
        return value
    more = len(target) - len(before)
    if more:  # expand_v2 (Paddle 2.6.2) infers wrong shapes where it adds dimensions before an open one
        value = paddle.unsqueeze(value, list(range(more)))
    axis = open_axis(value)
    if axis is not None:
        target[axis] = -1
    return paddle.expand(value, target)


def _pad(build: Build, node: Node) -> Any:
    import paddle

    rank = build.rank(node.inputs[0])
    pads = build.ints(node, 1, "pads") or []
    axes = [axis_of(axis, rank) for axis in build.ints(node, 3, "axes") or range(rank)]
    if len(pads) != 2 * len(axes):
        raise CannotImport(f"its pads {pads} do not fit {len(axes)} dimensions")
    if build.opset < 11:
        fill = float(node.attrs.get("value", 0.0))
    else:
        fill = float(build.constant(node.inputs[2], "value").reshape(()).item()) if node.has(2) else 0.0
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        before[axis], after[axis] = pads[index], pads[index + len(axes)]
    value = build.value(node.inputs[0])
    mode = node.attrs.get("mode", "constant")
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    if mode not in names:
        raise CannotImport(f"its mode is {mode!r}, expected one of {', '.join(names)}")
    cut = [axis for axis in range(rank) if before[axis] < 0 or after[axis] < 0]
    if cut:
        shape = build.shape(node.inputs[0])
        ends = [shape[axis] + min(after[axis], 0) for axis in cut]
        value = paddle.slice(value, cut, [max(-before[axis], 0) for axis in cut], ends)
        before, after = [max(each, 0) for each in before], [max(each, 0) for each in after]
    if not any(before) and not any(after):
        return value
    if rank == 4 and not any((*before[:2], *after[:2])):
        edges = [before[3], after[3], before[2], after[2]]
        return paddle.nn.functional.pad(value, edges, mode=names[mode], value=fill)
    if mode != "constant":
        raise CannotImport(f"its mode is {mode!r} on {rank} dimensions, expected padding of height and width")
    pairs = [size for axis in range(rank) for size in (before[axis], after[axis])]
    return paddle.nn.functional.pad(value, pairs, value=fill)


def _depth_to_space(build: Build, node: Node) -> Any:
    import paddle

    batch, channels, height, width = build.shape(node.inputs[0])
    block = int(node.attrs.get("blocksize", 1))
    mode = node.attrs.get("mode", "DCR")
    left = channels // (block * block)
    split = [batch, left, block, block, height, width] if mode == "CRD" else [batch, block, block, left, height, width]
    order = [0, 1, 4, 2, 5, 3] if mode == "CRD" else [0, 3, 4, 1, 5, 2]
    value = build.reshape(build.value(node.inputs[0]), (batch, channels, height, width), split)
    value = paddle.transpose(value, order)
    return build.reshape(value, [split[axis] for axis in order], [batch, left, height * block, width * block])


def _space_to_depth(build: Build, node: Node) -> Any:
    import paddle

    batch, channels, height, width = build.shape(node.inputs[0])
    block = int(node.attrs.get("blocksize", 1))
    split = [batch, channels, height // block, block, width // block, block]
    order = [0, 3, 5, 1, 2, 4]
    value = build.reshape(build.value(node.inputs[0]), (batch, channels, height, width), split)
    value = paddle.transpose(value, order)
    after = [batch, channels * block * block, height // block, width // block]
    return build.reshape(value, [split[axis] for axis in order], after)


RULES: dict[str, Rule] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Tile": _tile,
    "Expand": _expand,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
