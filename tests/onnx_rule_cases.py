"""Small Paddle programs for each export rule, and values for their inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

import act_pipeline  # noqa: F401  (makes paddle importable)


class Lazy:
    """A module that is imported when one of its names is used: Paddle takes seconds."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


paddle: Any = Lazy("paddle")
F: Any = Lazy("paddle.nn.functional")


class Inputs:
    """Inputs of a program, declared when they are first used, and values for them."""

    KINDS = {
        "x": ([-1, 4, 6, 6], "float32"),  # normally distributed
        "y": ([-1, 4, 6, 6], "float32"),
        "z": ([-1, 4, 6, 6], "float32"),  # integers, with repetitions
        "p": ([-1, 4, 6, 6], "float32"),  # 0.5 to 2
        "s": ([-1, 5], "float32"),
        "t": ([-1, 5, 8], "float32"),
        "odd": ([-1, 3, 7, 5], "float32"),
        "grid": ([-1, 3, 5, 2], "float32"),
        "i": ([-1, 5], "int64"),  # 0 to 3
        "j": ([-1, 5], "int64"),  # -9 to 9 without 0
        "k": ([-1, 5], "int64"),
        "b": ([-1, 5], "bool"),
        "c": ([-1, 5], "bool"),
        "rows": ([3], "int64"),  # different, 0 to 3
        "whole": ([4, 5], "float32"),  # without a batch
        "fixed": ([1, 4, 6, 6], "float32"),
        "volume": ([-1, 2, 3, 4, 5], "float32"),
    }

    def __init__(self) -> None:
        self.used: dict[str, Any] = {}
        self.parameters: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self.KINDS:
            raise AttributeError(name)
        if name not in self.used:
            self.used[name] = paddle.static.data(name, *self.KINDS[name])
        return self.used[name]

    def weight(self, *shape: int, low: float | None = None) -> Any:
        """Return a parameter, normally distributed, or from ``low`` to ``low + 1``."""
        rng = np.random.default_rng(len(self.parameters))
        value = (rng.normal(size=shape) if low is None else rng.uniform(low, low + 1, shape)).astype(np.float32)
        self.parameters.append(value)
        initializer = paddle.nn.initializer.Assign(value)
        return paddle.static.create_parameter(
            list(shape), "float32", f"weight_{len(self.parameters)}", default_initializer=initializer
        )

    def values(self, batch: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        made = {}
        for name in self.used:
            shape, dtype = self.KINDS[name]
            sizes = [batch if size < 0 else size for size in shape]
            if dtype == "bool":
                value = rng.random(sizes) > 0.5
            elif name == "rows":
                value = np.array([3, 0, 2])
            elif name == "i":
                value = rng.integers(0, 4, sizes)
            elif dtype == "int64":
                value = rng.integers(1, 10, sizes) * rng.choice([-1, 1], sizes)
            elif name == "p":
                value = rng.uniform(0.5, 2, sizes)
            elif name == "z":
                value = rng.integers(-3, 4, sizes)
            elif name == "grid":
                value = rng.uniform(-1.3, 1.3, sizes)
            else:
                value = rng.normal(size=sizes) * 2
            made[name] = value.astype(dtype)
        return made


def unary(name: str) -> Callable[[Inputs], Any]:
    return lambda v: getattr(paddle, name)(v.x)


def binary(name: str) -> Callable[[Inputs], Any]:
    """Operands of the same shape, of a lower rank, a scalar, and a parameter for each channel."""

    def program_of(v: Inputs) -> list[Any]:
        call = getattr(paddle, name)
        return [call(v.p, v.x), call(v.p, v.weight(6)), call(v.p, v.weight(4, 1, 1)), call(v.p, v.weight(1))]

    return program_of


def whole_numbers(name: str) -> Callable[[Inputs], Any]:
    return lambda v: getattr(paddle, name)(v.k, v.j)


def comparison(name: str) -> Callable[[Inputs], Any]:
    return lambda v: [getattr(paddle, name)(v.z, v.z.flip(-1)), getattr(paddle, name)(v.i, v.j)]


def activation(name: str, **options: Any) -> Callable[[Inputs], Any]:
    return lambda v: getattr(F, name)(v.x, **options)


def reduction(name: str) -> Callable[[Inputs], Any]:
    def program_of(v: Inputs) -> list[Any]:
        call = getattr(paddle, name)
        return [
            call(v.x), call(v.x, keepdim=True), call(v.x, axis=-1), call(v.x, axis=[1, -1], keepdim=True),
            call(v.x, axis=[0]), call(v.x, axis=[-2, 1]),
        ]  # fmt: skip

    return program_of


def one_op(kind: str, inputs: dict[str, Any], attrs: dict[str, Any], dtype: str, slot: str = "Out") -> Any:
    """Append an op that no public function of Paddle 2.6 creates."""
    helper = paddle.base.layer_helper.LayerHelper(kind)
    made = helper.create_variable_for_type_inference(dtype)
    helper.append_op(type=kind, inputs=inputs, outputs={slot: made}, attrs=attrs)
    return made


CASES: dict[str, Callable[[Inputs], Any]] = {
    **{name: unary(name) for name in ("exp", "abs", "floor", "ceil", "sin", "cos", "erf", "tanh", "square", "sign",
                                      "tan", "atan", "neg")},
    **{name: (lambda v, name=name: getattr(paddle, name)(v.p))
       for name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "round")},
    "pow": lambda v: [paddle.pow(v.p, 1.7), v.x**2],
    "pow of tensors": lambda v: [paddle.pow(v.p, v.x), v.i**2],
    **{name: binary(name) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
    "fmax": lambda v: [paddle.fmax(v.x, v.y), paddle.fmax(paddle.log(v.x), v.y), paddle.fmax(v.y, paddle.log(v.x))],
    "mod of floats": binary("mod"),
    "floor_divide of floats": binary("floor_divide"),
    **{f"{name} of integers": whole_numbers(name) for name in ("mod", "floor_divide", "maximum", "minimum", "add",
                                                               "multiply")},
    **{name: comparison(name) for name in ("greater_than", "greater_equal", "less_than", "less_equal", "equal",
                                           "not_equal")},
    **{name: (lambda v, name=name: getattr(paddle, name)(v.b, v.c))
       for name in ("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor")},
    "logical_not": lambda v: [paddle.logical_not(v.b), paddle.logical_not(v.i), ~v.c],
    "isnan": lambda v: [paddle.isnan(v.x), paddle.isinf(paddle.log(v.x * 0))],
    "older names": lambda v: [one_op("minus", {"X": v.x, "Y": v.y}, {}, "float32"), one_op("mean", {"X": v.x}, {}, "float32"),
                              one_op("increment", {"X": v.weight(1)}, {"step": 2.0}, "float32")],
    "add_n": lambda v: paddle.add_n([v.x, v.y, v.p]),
    "scale": lambda v: [paddle.scale(v.x, 2, 3), paddle.scale(v.x, 2, 3, bias_after_scale=False), v.i * 3],
    "clip": lambda v: [v.x.clip(-1, 0.5), v.x.clip(min=0.1), v.k.clip(-2, 5),
                       paddle.clip(v.x, v.weight(1), v.weight(1, low=1.0))],
    "mask": lambda v: v.s * paddle.assign(np.array([1, 0, 1, 1, 0], np.float32)),
    # activations
    **{name: activation(name) for name in ("relu", "sigmoid", "silu", "swish", "hardswish", "hardsigmoid", "relu6",
                                           "mish", "gelu", "leaky_relu", "elu", "celu", "selu", "softplus",
                                           "log_sigmoid", "softsign", "hardtanh", "thresholded_relu")},
    "gelu by tanh": activation("gelu", approximate=True),
    "leaky_relu 0.3": activation("leaky_relu", negative_slope=0.3),
    "elu 0.5": activation("elu", alpha=0.5),
    "softplus of another slope": lambda v: F.softplus(v.x, beta=2, threshold=1),
    "hardsigmoid of another slope": activation("hardsigmoid", slope=0.2, offset=0.4),
    "hard_swish of another size": lambda v: one_op(
        "hard_swish", {"X": v.x}, {"threshold": 4.0, "scale": 5.0, "offset": 2.0}, "float32"),
    "prelu": lambda v: [F.prelu(v.x, v.weight(1)), F.prelu(v.x, v.weight(4))],
    "dropout": lambda v: [F.dropout(v.x, 0.3), F.dropout(v.x, 0.3, mode="downscale_in_infer")],
    # normalization
    "softmax": lambda v: [F.softmax(v.x, axis) for axis in (-1, 1, 0)],
    "log_softmax": lambda v: [F.log_softmax(v.x, axis) for axis in (-1, 1)],
    "layer_norm": lambda v: [
        F.layer_norm(v.t, [8], v.weight(8), v.weight(8)), F.layer_norm(v.t, [5, 8]),
        F.layer_norm(v.x, [6, 6], v.weight(36), epsilon=1e-3)],
    "layer_norm with computed factors": lambda v: F.layer_norm(v.t, [8], v.weight(8) + 1, v.weight(8) * 2),
    "batch_norm": lambda v: [
        F.batch_norm(v.relu, v.weight(4), v.weight(4, low=0.5), v.weight(4), v.weight(4))
        for v.relu in [F.relu(v.x)]],
    "instance_norm": lambda v: [F.instance_norm(v.x, weight=v.weight(4), bias=v.weight(4)),
                                F.instance_norm(v.x, eps=1e-3)],
    "group_norm": lambda v: [paddle.static.nn.group_norm(v.x, 2), paddle.static.nn.group_norm(
        v.x, 4, param_attr=paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.7)))],
    "p_norm": lambda v: [paddle.norm(v.x, p, axis=axis, keepdim=keep) for p, axis, keep in (
        (1, -1, False), (2, 1, True), (np.inf, 2, False), (-np.inf, 2, True), (3, -1, False))],
    "normalize": lambda v: F.normalize(v.x, axis=1),
    # reductions
    **{name: reduction(name) for name in ("mean", "sum", "max", "min", "prod")},
    "sum of booleans": lambda v: [paddle.sum(v.b, axis=1), paddle.sum(v.i, axis=-1, keepdim=True)],
    "all and any": lambda v: [call(v.b, axis=1, keepdim=keep) for call in (paddle.all, paddle.any)
                              for keep in (True, False)] + [paddle.any(v.b)],
    "argmax": lambda v: [
        v.z.argmax(axis=1), v.x.argmax(axis=-1, keepdim=True), v.x.argmax(), v.x.argmax(axis=-1, dtype="int32"),
        v.x.argmin(axis=2), v.fixed.argmax(keepdim=True)],
    "topk": lambda v: [*paddle.topk(v.s, 3), *paddle.topk(v.x, 2, axis=1, largest=False),
                       *paddle.topk(v.x, 4, axis=-2)],
    "topk of a computed number": lambda v: paddle.topk(v.t, paddle.shape(v.t)[1] - 1, axis=-1),
    "argsort": lambda v: [paddle.argsort(v.s), paddle.sort(v.x, axis=2, descending=True)],
    "cumsum": lambda v: [v.x.cumsum(1), v.x.cumsum(-1), v.i.cumsum(1), v.fixed.cumsum()],
    "cumsum backwards": lambda v: one_op(
        "cumsum", {"X": v.x}, {"axis": 2, "exclusive": True, "reverse": True, "flatten": False}, "float32"),
    # pooling and sampling
    **{f"{kind} {number}": (lambda v, kind=kind, options=options: getattr(F, f"{kind}_pool2d")(
        v.odd, **options)) for kind in ("max", "avg") for number, options in enumerate((
            {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 3, "stride": 2, "ceil_mode": True}, {"kernel_size": 2, "stride": 2, "ceil_mode": True},
            {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "ceil_mode": True},
            {"kernel_size": 3, "stride": 2, "padding": "SAME"}, {"kernel_size": 3, "padding": "VALID"},
            {"kernel_size": 3, "stride": 2, "padding": [1, 0, 0, 1]}))},
    "avg with padding": lambda v: [F.avg_pool2d(v.odd, 3, 2, 1, exclusive=False, ceil_mode=ceil)
                                   for ceil in (False, True)],
    "adaptive": lambda v: [call(v.odd, size) for call in (
        F.adaptive_avg_pool2d, F.adaptive_max_pool2d) for size in (1, [7, 1], [3, 2], [7, 5])],
    "max with mask": lambda v: F.max_pool2d(v.x, 2, 2, return_mask=True)[0],
    "nearest": lambda v: [F.interpolate(v.odd, **options, mode="nearest") for options in (
        {"scale_factor": 2}, {"size": [14, 10]}, {"size": [9, 4]}, {"scale_factor": [1.5, 2.5]}, {"size": [3, 3]})],
    "nearest with corners": lambda v: one_op("nearest_interp_v2", {"X": v.odd}, {
        "out_h": 9, "out_w": 12, "scale": [], "align_corners": True, "data_layout": "NCHW",
        "interp_method": "nearest"}, "float32"),
    **{mode: (lambda v, mode=mode: [F.interpolate(v.odd, mode=mode, **options) for options in (
        {"size": [14, 10]}, {"size": [9, 4]}, {"size": [9, 12], "align_corners": True}, {"scale_factor": 2.0},
        {"scale_factor": [1.5, 2.5], "align_corners": True})]) for mode in ("bilinear", "bicubic")},
    "bilinear, asymmetric": lambda v: [F.interpolate(v.odd, size, mode="bilinear", align_mode=1)
                                       for size in ([14, 10], [9, 4])],
    "a computed size": lambda v: [F.interpolate(v.odd, paddle.shape(v.x)[2:] + 3, mode=mode)
                                  for mode in ("nearest", "bilinear")],
    "a computed factor": lambda v: F.interpolate(v.odd, scale_factor=v.weight(1, low=1.5) * 1.0),
    "grid_sample": lambda v: [F.grid_sample(v.x, v.grid, mode, padding, align)
                              for mode in ("bilinear", "nearest") for padding in ("zeros", "border", "reflection")
                              for align in (True, False)],
    "pixel_shuffle": lambda v: F.pixel_shuffle(v.x, 2),
    # shapes
    "reshape": lambda v: [paddle.reshape(v.x, shape) for shape in ([-1, 144], [0, 4, 36], [-1, 6], [0, -1, 12])],
    "reshape to the batch": lambda v: [
        paddle.reshape(v.x, [paddle.shape(v.x)[0], 12, 12]),
        paddle.reshape(v.x, paddle.concat([paddle.shape(v.x)[:2], paddle.full([1], 36, "int32")]))],
    "flatten": lambda v: [v.x.flatten(), v.x.flatten(1), v.x.flatten(0, 1), v.x.flatten(1, 2), v.x.flatten(-2)],
    "transpose": lambda v: v.x.transpose([0, 2, 3, 1]),
    "unsqueeze": lambda v: [v.s.unsqueeze(axis) for axis in (0, 1, -1, [1, 2], [0, -1], [2, 0], [-1, 1])],
    "squeeze": lambda v: [v.s.unsqueeze([1, 3]).squeeze(axis) for axis in (1, -1, [1, 3], [1, 2], None)[:4]]
    + [v.fixed[:, :1].squeeze(), v.fixed.squeeze([0])],
    "concat": lambda v: [paddle.concat([v.x, v.y, v.x], axis) for axis in (0, 1, -1)],
    "stack": lambda v: [paddle.stack([v.x, v.y], axis) for axis in (0, 2, -1)],
    "split": lambda v: [*paddle.split(v.x, 2, 1), *paddle.split(v.x, [1, 2, -1], -1),
                        *paddle.split(v.weight(6, 4), [2, 4])],
    "split of the batch": lambda v: paddle.split(paddle.concat([v.s, v.s]), 2, 0),
    "unbind": lambda v: [*paddle.unbind(v.t, 1), *paddle.unstack(v.x, 1)],
    "slice": lambda v: [v.x[:, 1:3], v.x[:, -1], v.x[:, :, 2:100], v.x[0], v.weight(6, 8)[2:4], v.x[:, 0, 1:-1, 3]],
    "a computed slice": lambda v: v.t[:, : paddle.shape(v.t)[2] - 5],
    "strided_slice": lambda v: [v.x[:, :, ::2, 1::3], v.x[:, :, ::-1], v.x[:, :, 4:1:-2, 1], v.x[..., -2::-1]]
    + [paddle.strided_slice(v.x, [2, 3], [-1, 0], [-100, 5], [-1, 2])],
    "flip": lambda v: [v.x.flip([2]), v.x.flip([1, -1])],
    "roll": lambda v: [v.x.roll(2, 2), v.x.roll([1, -2], [2, 3]), v.t.roll(3)],
    "tile": lambda v: [v.s.tile([1, 2]), v.s.tile([2]), v.s.tile([2, 1, 3]), v.b.tile([1, 2])],
    "a computed tile": lambda v: paddle.tile(v.weight(1, 4), [paddle.shape(v.x)[0], 1]),
    "expand": lambda v: [v.s.expand([2, -1, 5]), v.x[:, :1].expand([-1, 3, 6, 6]), v.weight(1, 4).expand([3, 4]),
                         v.b.unsqueeze(1).expand([-1, 2, 5])],
    "expand to the batch": lambda v: [v.weight(1, 4).expand([paddle.shape(v.x)[0], 4]),
                                      v.weight(1, 4, 6, 6).expand_as(v.x)],
    "pad": lambda v: [F.pad(v.x, [0, 0, 1, 2, 0, 3, 2, 0], value=1.5), F.pad(v.s, [0, 0, 1, 2])],
    "pad3d": lambda v: [F.pad(v.x, [1, 2, 0, 3], mode=mode) for mode in ("constant", "reflect", "replicate")]
    + [F.pad(v.x, [1, 2, 0, 3], value=-2.0), F.pad(v.volume, [1, 0, 2, 1, 0, 3], data_format="NCDHW")],
    "triangle": lambda v: [v.t.tril(), v.t.triu(1), v.t.tril(-1)],
    # indices
    "gather": lambda v: [
        paddle.gather(v.x, v.rows, 1), paddle.gather(v.x, v.rows.unsqueeze(1), 1),
        paddle.gather(v.whole, v.i.flatten()), paddle.gather(v.whole, v.rows[0], 0),
        paddle.gather(v.x, paddle.assign(np.array([5, 0])), 3)],
    "gather_nd": lambda v: paddle.gather_nd(v.whole, v.i.unsqueeze(-1)),
    "index_select": lambda v: paddle.index_select(v.x, v.rows, axis=1),
    "index_sample": lambda v: paddle.index_sample(v.s, v.i),
    "take_along_axis": lambda v: [
        paddle.take_along_axis(v.s, v.i, 1), paddle.take_along_axis(v.s, v.i[:, :3], -1, broadcast=False)],
    "put_along_axis": lambda v: one_op(
        "put_along_axis", {"Input": v.s, "Index": paddle.argsort(v.s)[:, :3], "Value": v.t[:, :3, 0]},
        {"Axis": 1, "Reduce": "add"}, "float32", "Result"),
    "scatter": lambda v: [paddle.scatter(v.whole, v.rows, v.weight(3, 5)),
                          paddle.scatter(v.whole, v.rows, v.weight(3, 5), overwrite=False),
                          paddle.scatter(v.whole, v.i[0, :3] * 0 + 1, v.weight(3, 5), overwrite=False)],
    "scatter_nd_add": lambda v: [
        paddle.scatter_nd_add(v.whole, v.i.unsqueeze(-1)[0], v.weight(5, 5)),
        paddle.scatter_nd(v.i.unsqueeze(-1)[0], v.weight(5), [7])],
    "one_hot": lambda v: F.one_hot(v.i, 6),
    "embedding": lambda v: [F.embedding(v.i, v.weight(4, 6)),
                            F.embedding(v.i, v.weight(4, 6), padding_idx=1)],
    "where": lambda v: [paddle.where(v.b, v.s, v.weight(5)), paddle.where(v.s > 0, v.s, v.s * 2)],
    "nonzero": lambda v: paddle.nonzero(v.i),
    # constants and types
    "cast": lambda v: [paddle.cast(v.x, "int32"), paddle.cast(v.i, "float32"), paddle.cast(v.b, "int64"),
                       paddle.cast(v.x, "bool"), v.x + paddle.cast(paddle.assign(np.array([3])), "float32")],
    "shape": lambda v: [paddle.shape(v.x), paddle.shape(v.x)[2] * 2, paddle.numel(v.x)],
    "range": lambda v: [v.x[0, 0, 0] + paddle.arange(0, 6, 1, "float32"),
                        paddle.arange(0, paddle.shape(v.x)[0] * 3, 2)],
    "fill_constant": lambda v: [
        v.x + paddle.full([6], 2.5), v.i + paddle.full([1], 2**24 + 1, "int64"), v.b & paddle.full([5], True, "bool"),
        paddle.full([paddle.shape(v.x)[0], 3], 1.5), paddle.full([2, 2], v.weight(1))[:1]],
    "fill_constant_batch_size_like": lambda v: [
        one_op("fill_constant_batch_size_like", {"Input": source}, {
            "shape": [7, -1, 2], "value": 1.5, "str_value": "1.5", "dtype": 5, "input_dim_idx": 0, "output_dim_idx": 1},
            "float32") for source in (v.x, v.fixed)],
    "fill_any_like": lambda v: [paddle.full_like(v.x, 2.5), paddle.zeros_like(v.i), paddle.ones_like(v.b),
                                paddle.full_like(v.x, 3, "int64")],
    "assign": lambda v: [paddle.assign(v.x), v.i + paddle.assign(np.arange(5))],
    "eye": lambda v: v.t[:, :, :5] + paddle.eye(5),
    "linspace": lambda v: v.s + paddle.linspace(0, 1, 5),
    "meshgrid": lambda v: paddle.meshgrid(v.rows, v.rows + 1),
    # products
    "matmul": lambda v: [
        paddle.matmul(v.x, v.y, transpose_y=True), paddle.matmul(v.x, v.y, transpose_x=True),
        paddle.matmul(v.t, v.weight(8, 3)), paddle.matmul(v.t, v.weight(3, 8), transpose_y=True),
        paddle.matmul(v.t, v.weight(8)), paddle.matmul(v.weight(5), v.t), paddle.matmul(v.x, v.weight(6, 2)),
        paddle.matmul(v.s, v.s, transpose_x=True)],
    "bmm": lambda v: paddle.bmm(v.t, v.t.transpose([0, 2, 1])),
    "legacy products": lambda v: [
        one_op("mul", {"X": v.t, "Y": v.weight(8, 3)}, {"x_num_col_dims": 2, "y_num_col_dims": 1}, "float32"),
        one_op("mul", {"X": v.x, "Y": v.weight(4, 36, 3)}, {"x_num_col_dims": 1, "y_num_col_dims": 2}, "float32"),
        one_op("matmul", {"X": v.t, "Y": v.t}, {"transpose_X": False, "transpose_Y": True, "alpha": 0.5}, "float32")],
    "conv2d": lambda v: [
        F.conv2d(v.x, v.weight(5, 4, 3, 3), v.weight(5), 2, 1), F.conv2d(
            v.x, v.weight(6, 2, 3, 3), None, 1, [1, 0, 2, 1], 2, 2),
        F.conv2d(v.odd, v.weight(6, 1, 3, 3), v.weight(6), 2, "SAME", groups=3),
        F.conv2d(v.x, v.weight(2, 4, 3, 3) * 2, None, 1, "SAME", 2)],
    "conv2d_transpose": lambda v: [
        F.conv2d_transpose(v.odd, v.weight(3, 5, 3, 3), v.weight(5), 2, 1),
        F.conv2d_transpose(v.odd, v.weight(3, 5, 3, 3), None, 2, 1, 1),
        F.conv2d_transpose(v.x, v.weight(4, 3, 2, 4), v.weight(6), [2, 3], [0, 1, 1, 2], groups=2, dilation=2),
        F.conv2d_transpose(v.odd, v.weight(3, 2, 3, 3), None, 2, output_size=[16, 11]),
        F.conv2d_transpose(v.odd, v.weight(3, 2, 3, 3), None, 2, "SAME")],
    "depthwise_conv2d_transpose": lambda v: F.conv2d_transpose(
        v.odd, v.weight(3, 1, 4, 4), v.weight(3), 2, 1, groups=3),
    "conv2d_transpose and batch_norm": lambda v: [F.batch_norm(
        F.conv2d_transpose(v.x, v.weight(4, 6 // groups, 2, 2), v.weight(6), 2, groups=groups),
        v.weight(6), v.weight(6, low=0.5), v.weight(6), v.weight(6)) for groups in (1, 2)],
}  # fmt: skip
