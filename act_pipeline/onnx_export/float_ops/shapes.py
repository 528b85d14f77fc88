"""Export rules of ops that compute no values: they reshape, move, select, repeat or pad elements."""

from __future__ import annotations

import numpy as np

from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule, known_integers, refuse, vector
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

_INT64_MIN = -(2**63)


def _reshape(build: GraphBuilder, op: Op) -> str:
    result = [int(size) for size in build.shapes[op.output]]
    if "Shape" in op.inputs:
        return build.node("Reshape", [build.get(op.input("X")), vector(build, op.inputs["Shape"])], op.output)
    given = [int(size) for size in op.attrs.get("shape") or result]
    for sizes in (given, result):
        if sizes.count(-1) <= 1 and not (sizes is result and 0 in sizes):
            return build.reshape(build.get(op.input("X")), *sizes, hint=op.output)
    if "ShapeTensor" in op.inputs:
        target = vector(build, op.inputs["ShapeTensor"])
        return build.node("Reshape", [build.get(op.input("X")), target], op.output)
    raise CannotLower(f"its shape {given} leaves more than one size open")


def _flatten(build: GraphBuilder, op: Op) -> str:
    shape = [int(size) for size in build.shapes[op.input("X")]]
    if not shape:
        return build.reshape(build.get(op.input("X")), 1, hint=op.output)
    first, last = (int(op.attrs[key]) % len(shape) for key in ("start_axis", "stop_axis"))
    if min(shape[last + 1 :], default=0) < 0:
        raise CannotLower(f"the shape {shape} is open after axis {last}")
    # 0 keeps a size, so that only the merged one is to be inferred.
    sizes = [*[0] * first, -1, *shape[last + 1 :]]
    return build.reshape(build.get(op.input("X")), *sizes, hint=op.output)


def _transpose(build: GraphBuilder, op: Op) -> str:
    return build.node("Transpose", [build.get(op.input("X"))], op.output, perm=[int(axis) for axis in op.attrs["axis"]])


def _unsqueeze(build: GraphBuilder, op: Op) -> str:
    refuse(op, "AxesTensor", "AxesTensorList")
    new: list[bool] = [False] * len(build.shapes[op.input("X")])
    for axis in op.attrs["axes"]:  # Paddle inserts one after the other, ONNX all at once
        new.insert(axis if axis >= 0 else axis + len(new) + 1, True)
    axes = build.ints(*np.flatnonzero(new))
    return build.node("Unsqueeze", [build.get(op.input("X")), axes], op.output)


def _squeeze(build: GraphBuilder, op: Op) -> str:
    shape = build.shapes[op.input("X")]
    axes = [int(axis) % len(shape) for axis in op.attrs.get("axes") or range(len(shape))]
    # Paddle leaves an axis of another size as it is.
    axes = [axis for axis in axes if shape[axis] == 1]
    value = build.get(op.input("X"))
    return build.node("Squeeze", [value, build.ints(*axes)], op.output) if axes else value


def _concat(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs.get("axis", 0))
    if "AxisTensor" in op.inputs:
        known = known_integers(build, op.inputs["AxisTensor"])
        if known is None:
            raise CannotLower("its AxisTensor is computed at run time")
        axis = known[0]
    return build.node("Concat", [build.get(name) for name in op.inputs["X"]], op.output, axis=axis)


def _stack(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["axis"])
    parts = [build.node("Unsqueeze", [build.get(name), build.ints(axis)]) for name in op.inputs["X"]]
    return build.node("Concat", parts, op.output, axis=axis)


def _split(build: GraphBuilder, op: Op) -> None:
    refuse(op, "AxisTensor", "SectionsTensorList")
    name, names = op.input("X"), op.outputs["Out"]
    axis = int(op.attrs["axis"]) % len(build.shapes[name])
    sizes = [int(build.shapes[output][axis]) for output in names]
    if min(sizes) < 0:
        sizes = [int(size) for size in op.attrs.get("sections") or ()]
    if name in build.constants and sizes and min(sizes) >= 0:
        ends = np.cumsum(sizes)[:-1]
        build.constants.update(zip(names, np.split(build.constants[name], ends, axis)))
        return
    inputs, attrs = [build.get(name)], {"axis": axis}
    if sizes and min(sizes) >= 0:
        inputs.append(build.ints(*sizes))
    elif sizes:
        raise CannotLower("the sizes of its parts are open")
    elif build.opset >= 18:
        attrs["num_outputs"] = len(names)
    made = build.node("Split", inputs, op.output, len(names), **attrs)
    build.values.update(zip(names, made if len(names) > 1 else [made]))


def _unbind(build: GraphBuilder, op: Op) -> None:
    axis, names = int(op.attrs.get("axis", 0)), next(iter(op.outputs.values()))
    for index, name in enumerate(names):
        position = build.initializer(np.array(index, np.int64))
        build.values[name] = build.node("Gather", [build.get(op.input("X")), position], name, axis=axis)


def _bounds(build: GraphBuilder, op: Op, kind: str) -> tuple[str, list[int] | None]:
    """Return the starts, ends or strides of a slice: name of a vector, and the integers if they are known."""
    names = op.inputs.get(f"{kind}Tensor") or op.inputs.get(f"{kind}TensorList")
    known = known_integers(build, names) if names else [int(number) for number in op.attrs[kind.lower()]]
    return (vector(build, names or []) if known is None else build.ints(*known)), known


def _slice(build: GraphBuilder, op: Op) -> str | None:
    axes = [int(axis) for axis in op.attrs["axes"]]
    dropped = [int(axis) for axis in op.attrs.get("decrease_axis") or ()]
    name = op.input("Input")
    (first, starts), (last, ends) = (_bounds(build, op, kind) for kind in ("Starts", "Ends"))
    if name in build.constants and starts is not None and ends is not None:
        # q, k and v are slices of one weight; as constants they can be stored as integers
        value = build.constants[name]
        for axis, start, end in zip(axes, starts, ends):
            value = value[(slice(None),) * axis + (slice(start, end),)]
        build.constants[op.output] = value.reshape(
            [size for axis, size in enumerate(value.shape) if axis not in dropped]
        )
        return None
    made = build.node("Slice", [build.get(name), first, last, build.ints(*axes)], op.output)
    return build.node("Squeeze", [made, build.ints(*dropped)], op.output) if dropped else made


def _strided_slice(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["axes"]]
    dropped = [int(axis) for axis in op.attrs.get("decrease_axis") or ()]
    (first, _), (last, ends), (by, steps) = (_bounds(build, op, kind) for kind in ("Starts", "Ends", "Strides"))
    if ends is not None and steps is not None:
        sizes = [build.shapes[op.input("Input")][axis] for axis in axes]
        last = build.ints(
            *[_backward_end(end, size) if step < 0 else end for end, step, size in zip(ends, steps, sizes)]
        )
    made = build.node("Slice", [build.get(op.input("Input")), first, last, build.ints(*axes), by], op.output)
    return build.node("Squeeze", [made, build.ints(*dropped)], op.output) if dropped else made


def _backward_end(end: int, size: int) -> int:
    """Return the ONNX end of a backward slice; Paddle's -1 is before the first element, and smaller ends stop at it."""
    if end == -1:
        return _INT64_MIN
    return 0 if size >= 0 and end + size < 0 else end


def _flip(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["axis"]]
    count = len(axes)
    bounds = [build.ints(*[number] * count) for number in (-1, _INT64_MIN)]
    inputs = [build.get(op.input("X")), *bounds, build.ints(*axes), build.ints(*[-1] * count)]
    return build.node("Slice", inputs, op.output)


def _roll(build: GraphBuilder, op: Op) -> str:
    refuse(op, "ShiftsTensor")
    value = build.get(op.input("X"))
    shifts, axes = ([int(number) for number in op.attrs.get(key) or ()] for key in ("shifts", "axis"))
    flat = not axes
    if flat:
        value, axes = build.reshape(value, -1), [0]
    for shift, axis in zip(shifts, axes):
        halves = [(-shift, 2**62), (0, -shift)] if shift else []
        parts = [build.node("Slice", [value, build.ints(start), build.ints(end), build.ints(axis)])
                 for start, end in halves]  # fmt: skip
        value = build.node("Concat", parts, op.output, axis=axis) if parts else value
    if flat:
        return build.node("Reshape", [value, build.node("Shape", [build.get(op.input("X"))])], op.output)
    return value


def _tile(build: GraphBuilder, op: Op) -> str:
    rank = len(build.shapes[op.input("X")])
    names = op.inputs.get("RepeatTimes") or op.inputs.get("repeat_times_tensor") or []
    known = known_integers(build, names) if names else [int(number) for number in op.attrs["repeat_times"]]
    if known is not None:
        count, repeats = len(known), build.ints(*[1] * (rank - len(known)), *known)
    else:
        count = len(names) if len(names) > 1 else int(build.shapes[names[0]][0]) if build.shapes[names[0]] else 1
        repeats = vector(build, names)
        if count < rank:
            repeats = build.node("Concat", [build.ints(*[1] * (rank - count)), repeats], axis=0)
    value = build.get(op.input("X"))
    if count > rank:
        value = build.node("Unsqueeze", [value, build.ints(*range(count - rank))])
    return build.node("Tile", [value, repeats], op.output)


def _expand(build: GraphBuilder, op: Op) -> str:
    names = op.inputs.get("Shape") or op.inputs.get("expand_shapes_tensor") or []
    known = known_integers(build, names) if names else [int(size) for size in op.attrs["shape"]]
    if known is None:
        target = build.node("Max", [vector(build, names), build.ints(1)])
    else:
        target = build.ints(*[max(size, 1) for size in known])  # -1 keeps a size, as 1 does in ONNX
    return build.node("Expand", [build.get(op.input("X")), target], op.output)


def _expand_as(build: GraphBuilder, op: Op) -> str:
    if "Y" not in op.inputs:
        target = build.ints(*[max(int(size), 1) for size in op.attrs["target_shape"]])
    else:
        target = build.node("Shape", [build.get(op.input("Y"))])
    return build.node("Expand", [build.get(op.input("X")), target], op.output)


def _pad(build: GraphBuilder, op: Op) -> str:
    """Pad all axes; the attribute holds the elements before and after each."""
    numbers = [int(number) for number in op.attrs["paddings"]]
    return _padded(build, op, numbers[::2], numbers[1::2], "constant", op.attrs.get("pad_value", 0.0))


def _pad3d(build: GraphBuilder, op: Op) -> str:
    """Pad the last three axes of [N, C, D, H, W]; the attribute holds left, right, top, bottom, front and back."""
    numbers = [int(number) for number in op.attrs["paddings"]]
    if "Paddings" in op.inputs:
        known = known_integers(build, op.inputs["Paddings"])
        if known is None:
            raise CannotLower("its Paddings is computed at run time")
        numbers = known
    before, after = numbers[::2][::-1], numbers[1::2][::-1]
    first_spatial = 1 if op.attrs.get("data_format") == "NDHWC" else 2
    left, right = [0] * first_spatial, [0] * (2 - first_spatial)
    mode = str(op.attrs.get("mode", "constant"))
    return _padded(build, op, left + before + right, left + after + right, mode, op.attrs.get("value", 0.0))


def _padded(build: GraphBuilder, op: Op, before: list[int], after: list[int], mode: str, value: float) -> str:
    known = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if build.opset >= 19:
        known["circular"] = "wrap"
    if mode not in known:
        raise CannotLower(f"its mode is {mode}, expected one of {', '.join(known)}; circular needs --opset 19")
    inputs = [build.get(op.input("X")), build.ints(*before, *after)]
    if mode == "constant":
        inputs.append(build.scalar(value, op.input("X")))
    return build.node("Pad", inputs, op.output, mode=known[mode])


def _triangle(build: GraphBuilder, op: Op) -> str:
    diagonal = build.initializer(np.array(op.attrs.get("diagonal", 0), np.int64))
    inputs = [build.get(op.input("X")), diagonal]
    return build.node("Trilu", inputs, op.output, upper=int(not op.attrs.get("lower")))


RULES: dict[str, Rule] = {
    "reshape2": _reshape,
    "flatten_contiguous_range": _flatten,
    "transpose2": _transpose,
    "unsqueeze2": _unsqueeze,
    "squeeze2": _squeeze,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "unbind": _unbind,
    "unstack": _unbind,
    "slice": _slice,
    "strided_slice": _strided_slice,
    "flip": _flip,
    "roll": _roll,
    "tile": _tile,
    "expand_v2": _expand,
    "expand_as_v2": _expand_as,
    "pad": _pad,
    "pad3d": _pad3d,
    "tril_triu": _triangle,
}
