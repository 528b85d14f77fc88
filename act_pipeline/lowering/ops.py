"""Float ops: one function for each kind of Paddle op that RT-DETR's graphs hold, all in float32 and integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from act_pipeline.errors import UserError
from act_pipeline.lowering.builder import GraphBuilder
from act_pipeline.lowering.compute import pads
from act_pipeline.lowering.source import DTYPES, Op

_SIMPLE = {"relu": "Relu", "sigmoid": "Sigmoid", "log": "Log", "floor": "Floor"}
_BINARY = {
    "elementwise_add": "Add",
    "elementwise_sub": "Sub",
    "elementwise_mul": "Mul",
    "elementwise_div": "Div",
    # Of RT-DETR's indices, which are not negative: there Paddle's floor and ONNX's truncation agree.
    "elementwise_floordiv": "Div",
    "elementwise_mod": "Mod",
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}
_INT64_MIN = -(2**63)


class CannotLower(Exception):
    """Why an op has no counterpart; the caller adds its type and output."""


def _dtype(op: Op, name: str = "dtype") -> type:
    number = int(op.attrs[name])
    if number not in DTYPES:
        raise CannotLower(f"its element type {number} is not known")
    return DTYPES[number]


def _onnx_type(build: GraphBuilder, dtype: type) -> int:
    return build.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _refuse(op: Op, *slots: str) -> None:
    for slot in slots:
        if slot in op.inputs:
            raise CannotLower(f"its {slot} is computed at run time")


def _shape_operand(build: GraphBuilder, names: list[str]) -> str:
    """Return an int64 vector of the elements that Paddle gives as several tensors of one element each."""
    parts = []
    for name in names:
        if name in build.constants:
            parts.append(build.initializer(build.constants[name].astype(np.int64).reshape(-1)))
        else:
            flat = build.node("Reshape", [build.get(name), build.ints(-1)])
            parts.append(build.node("Cast", [flat], to=build.onnx.TensorProto.INT64))
    return parts[0] if len(parts) == 1 else build.node("Concat", parts, axis=0)


def _trailing(build: GraphBuilder, op: Op) -> int:
    """Return how many axes the second operand lacks at its end; ONNX, like NumPy, aligns at the end."""
    axis, ranks = int(op.attrs.get("axis", -1)), [len(build.shapes[op.input(slot)]) for slot in ("X", "Y")]
    return max(ranks[0] - axis - ranks[1], 0) if axis >= 0 and ranks[1] > 0 else 0


def _binary(build: GraphBuilder, op: Op) -> str:
    left, right, trailing = op.input("X"), op.input("Y"), _trailing(build, op)
    operand = build.get(right)
    if trailing:
        if right in build.constants:
            value = build.constants[right]
            operand = build.initializer(value.reshape(value.shape + (1,) * trailing), right)
        else:
            rank = len(build.shapes[right])
            operand = build.node("Unsqueeze", [operand, build.ints(*range(rank, rank + trailing))])
    return build.node(_BINARY[op.type], [build.get(left), operand], op.output)


def _multiply(build: GraphBuilder, op: Op) -> str:
    """Multiply; by a mask of zeros and ones, which OpenVINO would fold into a scale and divide by, it is Where."""
    mask, value = build.constants.get(op.input("Y")), op.input("X")
    if mask is None or not np.isin(mask, (0, 1)).all() or build.shapes[op.output] != build.shapes[value]:
        return _binary(build, op)
    if mask.all():
        return build.get(value)
    chosen = mask.reshape(*mask.shape, *(1,) * _trailing(build, op)).astype(bool)
    zero = build.initializer(np.zeros((), mask.dtype))
    return build.node("Where", [build.initializer(chosen, op.input("Y")), build.get(value), zero], op.output)


def _activation(build: GraphBuilder, op: Op) -> str:
    return build.node(_SIMPLE[op.type], [build.get(op.input("X"))], op.output)


def _silu(build: GraphBuilder, op: Op) -> str:
    value = build.get(op.input("X"))
    return build.node("Mul", [value, build.node("Sigmoid", [value])], op.output)


def _gelu(build: GraphBuilder, op: Op) -> str:
    if op.attrs.get("approximate"):
        raise CannotLower("its approximation by tanh is not known here")
    value = build.get(op.input("X"))
    root = build.node("Div", [value, build.initializer(np.float32(np.sqrt(2.0)))])
    shifted = build.node("Add", [build.node("Erf", [root]), build.initializer(np.float32(1))])
    product = build.node("Mul", [value, shifted])
    return build.node("Mul", [product, build.initializer(np.float32(0.5))], op.output)


def _softmax(build: GraphBuilder, op: Op) -> str:
    return build.node("Softmax", [build.get(op.input("X"))], op.output, axis=int(op.attrs["axis"]))


def _layer_norm(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["begin_norm_axis"])
    shape = build.shapes[op.input("X")][axis:]
    inputs = [build.get(op.input("X"))]
    for slot, neutral in (("Scale", 1.0), ("Bias", 0.0)):
        value = build.constants[op.input(slot)] if slot in op.inputs else np.full(shape, neutral, np.float32)
        inputs.append(build.initializer(value.reshape(shape), f"{op.output}.{slot}"))
    return build.node("LayerNormalization", inputs, op.output, axis=axis, epsilon=float(op.attrs["epsilon"]))


def _batch_norm(build: GraphBuilder, op: Op) -> str:
    names = [op.input(slot) for slot in ("X", "Scale", "Bias", "Mean", "Variance")]
    value = build.node(
        "BatchNormalization", [build.get(name) for name in names], op.output, epsilon=float(op.attrs["epsilon"])
    )
    return value


def _pool(build: GraphBuilder, op: Op) -> str:
    value, kernel = build.get(op.input("X")), list(op.attrs["ksize"])
    maximum = op.attrs["pooling_type"] == "max"
    if op.attrs.get("global_pooling") or (op.attrs.get("adaptive") and kernel == [1, 1]):
        return build.node("GlobalMaxPool" if maximum else "GlobalAveragePool", [value], op.output)
    if op.attrs.get("adaptive"):
        raise CannotLower("adaptive pooling to more than one value")
    same = op.attrs.get("padding_algorithm") == "SAME"
    attrs = {
        "kernel_shape": kernel,
        "strides": list(op.attrs["strides"]),
        "pads": pads(op, build.shapes[op.input("X")][2:], kernel, [1, 1]),
        "ceil_mode": int(bool(op.attrs.get("ceil_mode")) and not same),
    }
    if not maximum:
        attrs["count_include_pad"] = int(not op.attrs.get("exclusive", True))
    return build.node("MaxPool" if maximum else "AveragePool", [value], op.output, **attrs)


def _nearest(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "OutSize", "SizeTensor", "Scale")
    if op.attrs.get("align_corners"):
        raise CannotLower("align_corners is not known here")
    height, width = build.shapes[op.input("X")][2:]
    scale = list(op.attrs.get("scale") or ())
    if not scale:
        scale = [op.attrs["out_h"] / height, op.attrs["out_w"] / width]
    scales = build.initializer(np.array([1, 1, scale[0], scale[-1]], np.float32))
    return build.node(
        "Resize", [build.get(op.input("X")), "", scales], op.output,
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _reshape(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "Shape")
    result = [int(size) for size in build.shapes[op.output]]
    given = [int(size) for size in op.attrs.get("shape") or result]
    for sizes in (given, result):
        if sizes.count(-1) <= 1 and not (sizes is result and 0 in sizes):
            return build.node("Reshape", [build.get(op.input("X")), build.ints(*sizes)], op.output)
    if "ShapeTensor" in op.inputs:
        target = _shape_operand(build, op.inputs["ShapeTensor"])
        return build.node("Reshape", [build.get(op.input("X")), target], op.output)
    raise CannotLower(f"its shape {given} leaves more than one size open")


def _flatten(build: GraphBuilder, op: Op) -> str:
    return _reshape(build, Op(op.type, op.inputs, op.outputs, {"shape": list(build.shapes[op.output])}))


def _transpose(build: GraphBuilder, op: Op) -> str:
    return build.node("Transpose", [build.get(op.input("X"))], op.output, perm=[int(axis) for axis in op.attrs["axis"]])


def _unsqueeze(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "AxesTensor", "AxesTensorList")
    kind = "Unsqueeze" if op.type == "unsqueeze2" else "Squeeze"
    return build.node(kind, [build.get(op.input("X")), build.ints(*op.attrs["axes"])], op.output)


def _concat(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "AxisTensor")
    return build.node("Concat", [build.get(name) for name in op.inputs["X"]], op.output, axis=int(op.attrs["axis"]))


def _stack(build: GraphBuilder, op: Op) -> str:
    axis = int(op.attrs["axis"])
    parts = [build.node("Unsqueeze", [build.get(name), build.ints(axis)]) for name in op.inputs["X"]]
    return build.node("Concat", parts, op.output, axis=axis)


def _split(build: GraphBuilder, op: Op) -> None:
    _refuse(op, "AxisTensor", "SectionsTensorList")
    axis, names = int(op.attrs["axis"]), op.outputs["Out"]
    sizes = [int(build.shapes[name][axis]) for name in names]
    if min(sizes) < 0:
        raise CannotLower("the sizes of its parts are open")
    made = build.node("Split", [build.get(op.input("X")), build.ints(*sizes)], op.output, len(names), axis=axis)
    build.values.update(zip(names, made if len(names) > 1 else [made]))


def _slice(build: GraphBuilder, op: Op) -> str | None:
    _refuse(op, "StartsTensor", "EndsTensor", "StartsTensorList", "EndsTensorList")
    axes, starts, ends = ([int(number) for number in op.attrs[key]] for key in ("axes", "starts", "ends"))
    dropped = [int(axis) for axis in op.attrs.get("decrease_axis") or ()]
    name = op.input("Input")
    if name in build.constants:  # q, k and v are slices of one weight: constants, to be stored as integers
        value = build.constants[name]
        for axis, start, end in zip(axes, starts, ends):
            value = value[(slice(None),) * axis + (slice(start, end),)]
        build.constants[op.output] = value.reshape(
            [size for axis, size in enumerate(value.shape) if axis not in dropped]
        )
        return None
    inputs = [build.get(name), build.ints(*starts), build.ints(*ends), build.ints(*axes)]
    made = build.node("Slice", inputs, op.output)
    return build.node("Squeeze", [made, build.ints(*dropped)], op.output) if dropped else made


def _flip(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["axis"]]
    count = len(axes)
    bounds = [build.ints(*[number] * count) for number in (-1, _INT64_MIN)]
    inputs = [build.get(op.input("X")), *bounds, build.ints(*axes), build.ints(*[-1] * count)]
    return build.node("Slice", inputs, op.output)


def _tile(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "RepeatTimes")
    if "repeat_times_tensor" in op.inputs:
        repeats, count = _shape_operand(build, op.inputs["repeat_times_tensor"]), len(op.inputs["repeat_times_tensor"])
    else:
        repeats, count = build.ints(*op.attrs["repeat_times"]), len(op.attrs["repeat_times"])
    value, missing = build.get(op.input("X")), count - len(build.shapes[op.input("X")])
    if missing > 0:
        value = build.node("Unsqueeze", [value, build.ints(*range(missing))])
    return build.node("Tile", [value, repeats], op.output)


def _cast(build: GraphBuilder, op: Op) -> str | None:
    dtype = _dtype(op, "out_dtype")
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")].astype(dtype)
        return None
    return build.node("Cast", [build.get(op.input("X"))], op.output, to=_onnx_type(build, dtype))


def _scale(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "ScaleTensor")
    value, factor, bias = build.get(op.input("X")), float(op.attrs["scale"]), float(op.attrs.get("bias", 0.0))
    if factor == 1 and bias == 0:
        return value
    dtype = build.dtypes.get(op.input("X"), np.float32)

    def step(kind: str, value: str, number: float) -> str:
        neutral = 1 if kind == "Mul" else 0
        return value if number == neutral else build.node(kind, [value, build.initializer(dtype(number))], op.output)

    if op.attrs.get("bias_after_scale", True):
        return step("Add", step("Mul", value, factor), bias)
    return step("Mul", step("Add", value, bias), factor)


def _clip(build: GraphBuilder, op: Op) -> str:
    _refuse(op, "Min", "Max")
    bounds = [build.initializer(np.float32(op.attrs[key])) for key in ("min", "max")]
    return build.node("Clip", [build.get(op.input("X")), *bounds], op.output)


def _where(build: GraphBuilder, op: Op) -> str:
    return build.node("Where", [build.get(op.input(slot)) for slot in ("Condition", "X", "Y")], op.output)


def _shape(build: GraphBuilder, op: Op) -> str:
    made = build.node("Shape", [build.get(op.input("Input"))])
    return build.node("Cast", [made], op.output, to=build.onnx.TensorProto.INT32)


def _range(build: GraphBuilder, op: Op) -> str:
    scalars = [build.node("Reshape", [build.get(op.input(slot)), build.initializer(np.zeros(0, np.int64))])
               for slot in ("Start", "End", "Step")]  # fmt: skip
    return build.node("Range", scalars, op.output)


def _fill_constant(build: GraphBuilder, op: Op) -> None:
    _refuse(op, "ValueTensor", "ShapeTensor", "ShapeTensorList")
    text = op.attrs.get("str_value") or ""
    number = float(text) if text else op.attrs["value"]
    build.constants[op.output] = np.full([int(size) for size in op.attrs["shape"]], number, _dtype(op))


def _assign_value(build: GraphBuilder, op: Op) -> None:
    values = next((op.attrs[key] for key in ("fp32_values", "int64_values", "int32_values", "bool_values",
                                             "fp64_values", "values") if op.attrs.get(key)), [])  # fmt: skip
    build.constants[op.output] = np.array(values, _dtype(op)).reshape([int(size) for size in op.attrs["shape"]])


def _fill_any_like(build: GraphBuilder, op: Op) -> str:
    dtype = _dtype(op) if int(op.attrs.get("dtype", -1)) >= 0 else np.float32
    value = build.onnx.numpy_helper.from_array(np.array([op.attrs["value"]], dtype))
    return build.node("ConstantOfShape", [build.node("Shape", [build.get(op.input("X"))])], op.output, value=value)


def _alias(build: GraphBuilder, op: Op) -> str | None:
    if op.input("X") in build.constants:
        build.constants[op.output] = build.constants[op.input("X")]
        return None
    return build.get(op.input("X"))


def _gather_nd(build: GraphBuilder, op: Op) -> str:
    index = build.node("Cast", [build.get(op.input("Index"))], to=build.onnx.TensorProto.INT64)
    return build.node("GatherND", [build.get(op.input("X")), index], op.output)


def _top_k(build: GraphBuilder, op: Op) -> None:
    _refuse(op, "K")
    values, indices = build.node(
        "TopK", [build.get(op.input("X")), build.ints(op.attrs["k"])], op.output, 2,
        axis=int(op.attrs["axis"]), largest=int(op.attrs["largest"]), sorted=int(op.attrs["sorted"]),
    )  # fmt: skip
    build.values[op.outputs["Out"][0]] = values
    build.values[op.outputs["Indices"][0]] = indices


def _reduce(build: GraphBuilder, op: Op) -> str:
    axes = [int(axis) for axis in op.attrs["dim"]]
    if op.attrs.get("reduce_all"):
        axes = list(range(len(build.shapes[op.input("X")])))
    keep, value = int(op.attrs["keep_dim"]), build.get(op.input("X"))
    if op.type == "reduce_sum" or build.opset >= 18:
        return build.node(_REDUCTIONS[op.type], [value, build.ints(*axes)], op.output, keepdims=keep)
    return build.node(_REDUCTIONS[op.type], [value], op.output, axes=axes, keepdims=keep)


def _grid_sample(build: GraphBuilder, op: Op) -> str:
    mode = op.attrs["mode"]
    if mode == "bilinear" and build.opset >= 20:
        mode = "linear"
    return build.node(
        "GridSample", [build.get(op.input("X")), build.get(op.input("Grid"))], op.output,
        mode=mode, padding_mode=op.attrs["padding_mode"], align_corners=int(op.attrs["align_corners"]),
    )  # fmt: skip


_RULES: dict[str, Callable[[GraphBuilder, Op], "str | None"]] = {
    **{kind: _activation for kind in _SIMPLE},
    **{kind: _binary for kind in _BINARY},
    **{kind: _reduce for kind in _REDUCTIONS},
    "elementwise_mul": _multiply,
    "silu": _silu,
    "gelu": _gelu,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "pool2d": _pool,
    "nearest_interp_v2": _nearest,
    "reshape2": _reshape,
    "flatten_contiguous_range": _flatten,
    "transpose2": _transpose,
    "unsqueeze2": _unsqueeze,
    "squeeze2": _unsqueeze,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "slice": _slice,
    "flip": _flip,
    "tile": _tile,
    "cast": _cast,
    "scale": _scale,
    "clip": _clip,
    "where": _where,
    "shape": _shape,
    "range": _range,
    "fill_constant": _fill_constant,
    "assign_value": _assign_value,
    "fill_any_like": _fill_any_like,
    "assign": _alias,
    "share_data": _alias,
    "gather_nd": _gather_nd,
    "top_k_v2": _top_k,
    "grid_sampler": _grid_sample,
}


def add_op(build: GraphBuilder, op: Op) -> None:
    """Add what an op computes.

    Raises:
        UserError: there is no rule for it, named with its output.
    """
    rule = _RULES.get(op.type)
    try:
        if rule is None:
            raise CannotLower("no rule for it")
        made = rule(build, op)
    except (CannotLower, KeyError) as reason:
        why = f"it needs {reason}, which is missing or not constant" if isinstance(reason, KeyError) else reason
        raise UserError(
            f"op {op.type} with the output {op.output!r} cannot be lowered to ONNX: {why}; expected an RT-DETR as "
            "tools/export_model.py writes it"
        ) from None
    if made is not None:
        build.values[op.output] = made
