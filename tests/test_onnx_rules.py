"""Export rules, op by op: small Paddle programs in ONNX Runtime and OpenVINO, compared with Paddle's executor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower
from act_pipeline.onnx_export.float_ops.registry import RULES

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")


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
            import paddle

            self.used[name] = paddle.static.data(name, *self.KINDS[name])
        return self.used[name]

    def weight(self, *shape: int, low: float | None = None) -> Any:
        """Return a parameter, normally distributed, or from ``low`` to ``low + 1``."""
        import paddle

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


def saved(
    directory: Path, cases: dict[str, Callable[[Inputs], Any]], parameter: bool = True
) -> tuple[InferenceModel, Inputs, list[tuple[str, int]]]:
    """Save a program.

    Args:
        directory: the model folder; it is created.
        cases: name -> function that adds ops and returns their outputs.
        parameter: add an output that depends on a parameter, since Paddle writes no file without any.

    Returns:
        The model, its inputs, and the case and the number of each output.
    """
    import paddle

    directory.mkdir()
    with static_mode():
        program, start, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        executor = paddle.static.Executor(paddle.CPUPlace())
        inputs = Inputs()
        with (
            paddle.static.program_guard(program, start),
            paddle.static.scope_guard(scope),
            paddle.utils.unique_name.guard(),
        ):
            outputs, labels = [], []
            for name, program_of in cases.items():
                made = program_of(inputs)
                for number, output in enumerate(made if isinstance(made, (list, tuple)) else [made]):
                    outputs.append(output)
                    labels.append((name, number))
            if parameter:
                outputs.append(inputs.weight(2) * 2)
                labels.append(("a parameter", 0))
            program = program.clone(for_test=True)
            executor.run(start)
            outputs = [program.global_block().var(output.name) for output in outputs]
            model = StaticGraph(program, list(inputs.used), outputs, scope, executor).save(directory)
            return model, inputs, labels


def in_paddle(model: InferenceModel, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    import paddle

    with static_mode():
        graph = StaticGraph.load(model)
        with paddle.static.scope_guard(graph.scope):
            return [graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets) for feed in feeds]


def in_onnxruntime(path: Path, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def in_openvino(path: Path, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return [[compiled(feed)[output].copy() for output in compiled.outputs] for feed in feeds]


def check(tmp_path: Path, cases: dict[str, Callable[[Inputs], Any]], **options: Any) -> None:
    """Compare programs in all engines, at batches of 1 and 3."""
    model, inputs, labels = saved(tmp_path / "model", cases)
    lowered = lower(model, tmp_path / "model.onnx", **options)
    feeds = [inputs.values(1), inputs.values(3)]
    expected = in_paddle(model, feeds)
    failed = []
    for engine, run in (("ort", in_onnxruntime), ("ov", in_openvino)):
        for wanted, found in zip(expected, run(lowered.path, feeds)):
            assert len(wanted) == len(found) == len(labels)
            for label, one, other in zip(labels, wanted, found):
                same_type = one.dtype == other.dtype or (engine == "ov" and other.dtype in (np.bool_, np.uint8))
                if one.shape != other.shape or not same_type:
                    failed.append(f"{engine} {label}: {other.dtype} {other.shape}, expected {one.dtype} {one.shape}")
                elif not np.allclose(other, one, rtol=1e-5, atol=1e-5, equal_nan=True):
                    difference = np.abs(other.astype(np.float64) - one).max()
                    failed.append(f"{engine} {label}: largest difference {difference}")
    assert not failed, "\n".join(failed)


def _import() -> tuple[Any, Any]:
    import paddle

    return paddle, paddle.nn.functional


def unary(name: str) -> Callable[[Inputs], Any]:
    return lambda v: getattr(_import()[0], name)(v.x)


def binary(name: str) -> Callable[[Inputs], Any]:
    """Operands of the same shape, of a lower rank, a scalar, and a parameter for each channel."""

    def program_of(v: Inputs) -> list[Any]:
        call = getattr(_import()[0], name)
        return [call(v.p, v.x), call(v.p, v.weight(6)), call(v.p, v.weight(4, 1, 1)), call(v.p, v.weight(1))]

    return program_of


def whole_numbers(name: str) -> Callable[[Inputs], Any]:
    return lambda v: getattr(_import()[0], name)(v.k, v.j)


def comparison(name: str) -> Callable[[Inputs], Any]:
    return lambda v: [getattr(_import()[0], name)(v.z, v.z.flip(-1)), getattr(_import()[0], name)(v.i, v.j)]


def activation(name: str, **options: Any) -> Callable[[Inputs], Any]:
    return lambda v: getattr(_import()[1], name)(v.x, **options)


def reduction(name: str) -> Callable[[Inputs], Any]:
    def program_of(v: Inputs) -> list[Any]:
        call = getattr(_import()[0], name)
        return [
            call(v.x), call(v.x, keepdim=True), call(v.x, axis=-1), call(v.x, axis=[1, -1], keepdim=True),
            call(v.x, axis=[0]), call(v.x, axis=[-2, 1]),
        ]  # fmt: skip

    return program_of


def _one_op(kind: str, inputs: dict[str, Any], attrs: dict[str, Any], dtype: str, slot: str = "Out") -> Any:
    """Append an op that no public function of Paddle 2.6 creates."""
    import paddle

    helper = paddle.base.layer_helper.LayerHelper(kind)
    made = helper.create_variable_for_type_inference(dtype)
    helper.append_op(type=kind, inputs=inputs, outputs={slot: made}, attrs=attrs)
    return made


CASES: dict[str, Callable[[Inputs], Any]] = {
    **{name: unary(name) for name in ("exp", "abs", "floor", "ceil", "sin", "cos", "erf", "tanh", "square", "sign",
                                      "tan", "atan", "neg")},
    **{name: (lambda v, name=name: getattr(_import()[0], name)(v.p))
       for name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p", "log2", "round")},
    "pow": lambda v: [_import()[0].pow(v.p, 1.7), v.x**2],
    "pow of tensors": lambda v: [_import()[0].pow(v.p, v.x), v.i**2],
    **{name: binary(name) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
    "mod of floats": binary("mod"),
    "floor_divide of floats": binary("floor_divide"),
    **{f"{name} of integers": whole_numbers(name) for name in ("mod", "floor_divide", "maximum", "minimum", "add",
                                                               "multiply")},
    **{name: comparison(name) for name in ("greater_than", "greater_equal", "less_than", "less_equal", "equal",
                                           "not_equal")},
    **{name: (lambda v, name=name: getattr(_import()[0], name)(v.b, v.c))
       for name in ("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor")},
    "logical_not": lambda v: [_import()[0].logical_not(v.b), _import()[0].logical_not(v.i), ~v.c],
    "isnan": lambda v: [_import()[0].isnan(v.x), _import()[0].isinf(_import()[0].log(v.x * 0))],
    "older names": lambda v: [_one_op("minus", {"X": v.x, "Y": v.y}, {}, "float32"), _one_op("mean", {"X": v.x}, {}, "float32"),
                              _one_op("increment", {"X": v.weight(1)}, {"step": 2.0}, "float32")],
    "add_n": lambda v: _import()[0].add_n([v.x, v.y, v.p]),
    "scale": lambda v: [_import()[0].scale(v.x, 2, 3), _import()[0].scale(v.x, 2, 3, bias_after_scale=False), v.i * 3],
    "clip": lambda v: [v.x.clip(-1, 0.5), v.x.clip(min=0.1), v.k.clip(-2, 5),
                       _import()[0].clip(v.x, v.weight(1), v.weight(1, low=1.0))],
    "mask": lambda v: v.s * _import()[0].assign(np.array([1, 0, 1, 1, 0], np.float32)),
    # activations
    **{name: activation(name) for name in ("relu", "sigmoid", "silu", "swish", "hardswish", "hardsigmoid", "relu6",
                                           "mish", "gelu", "leaky_relu", "elu", "celu", "selu", "softplus",
                                           "log_sigmoid", "softsign", "hardtanh", "thresholded_relu")},
    "gelu by tanh": activation("gelu", approximate=True),
    "leaky_relu 0.3": activation("leaky_relu", negative_slope=0.3),
    "elu 0.5": activation("elu", alpha=0.5),
    "softplus of another slope": lambda v: _import()[1].softplus(v.x, beta=2, threshold=1),
    "hardsigmoid of another slope": activation("hardsigmoid", slope=0.2, offset=0.4),
    "hard_swish of another size": lambda v: _one_op(
        "hard_swish", {"X": v.x}, {"threshold": 4.0, "scale": 5.0, "offset": 2.0}, "float32"),
    "prelu": lambda v: [_import()[1].prelu(v.x, v.weight(1)), _import()[1].prelu(v.x, v.weight(4))],
    "dropout": lambda v: [_import()[1].dropout(v.x, 0.3), _import()[1].dropout(v.x, 0.3, mode="downscale_in_infer")],
    # normalization
    "softmax": lambda v: [_import()[1].softmax(v.x, axis) for axis in (-1, 1, 0)],
    "log_softmax": lambda v: [_import()[1].log_softmax(v.x, axis) for axis in (-1, 1)],
    "layer_norm": lambda v: [
        _import()[1].layer_norm(v.t, [8], v.weight(8), v.weight(8)), _import()[1].layer_norm(v.t, [5, 8]),
        _import()[1].layer_norm(v.x, [6, 6], v.weight(36), epsilon=1e-3)],
    "layer_norm with computed factors": lambda v: _import()[1].layer_norm(v.t, [8], v.weight(8) + 1, v.weight(8) * 2),
    "batch_norm": lambda v: [
        _import()[1].batch_norm(v.relu, v.weight(4), v.weight(4, low=0.5), v.weight(4), v.weight(4))
        for v.relu in [_import()[1].relu(v.x)]],
    "instance_norm": lambda v: [_import()[1].instance_norm(v.x, weight=v.weight(4), bias=v.weight(4)),
                                _import()[1].instance_norm(v.x, eps=1e-3)],
    "group_norm": lambda v: [_import()[0].static.nn.group_norm(v.x, 2), _import()[0].static.nn.group_norm(
        v.x, 4, param_attr=_import()[0].ParamAttr(initializer=_import()[0].nn.initializer.Constant(0.7)))],
    "p_norm": lambda v: [_import()[0].norm(v.x, p, axis=axis, keepdim=keep) for p, axis, keep in (
        (1, -1, False), (2, 1, True), (np.inf, 2, False), (-np.inf, 2, True), (3, -1, False))],
    "normalize": lambda v: _import()[1].normalize(v.x, axis=1),
    # reductions
    **{name: reduction(name) for name in ("mean", "sum", "max", "min", "prod")},
    "sum of booleans": lambda v: [_import()[0].sum(v.b, axis=1), _import()[0].sum(v.i, axis=-1, keepdim=True)],
    "all and any": lambda v: [call(v.b, axis=1, keepdim=keep) for call in (_import()[0].all, _import()[0].any)
                              for keep in (True, False)] + [_import()[0].any(v.b)],
    "argmax": lambda v: [
        v.z.argmax(axis=1), v.x.argmax(axis=-1, keepdim=True), v.x.argmax(), v.x.argmax(axis=-1, dtype="int32"),
        v.x.argmin(axis=2), v.fixed.argmax(keepdim=True)],
    "topk": lambda v: [*_import()[0].topk(v.s, 3), *_import()[0].topk(v.x, 2, axis=1, largest=False),
                       *_import()[0].topk(v.x, 4, axis=-2)],
    "topk of a computed number": lambda v: _import()[0].topk(v.t, _import()[0].shape(v.t)[1] - 1, axis=-1),
    "argsort": lambda v: [_import()[0].argsort(v.s), _import()[0].sort(v.x, axis=2, descending=True)],
    "cumsum": lambda v: [v.x.cumsum(1), v.x.cumsum(-1), v.i.cumsum(1), v.fixed.cumsum()],
    "cumsum backwards": lambda v: _one_op(
        "cumsum", {"X": v.x}, {"axis": 2, "exclusive": True, "reverse": True, "flatten": False}, "float32"),
    # pooling and sampling
    **{f"{kind} {number}": (lambda v, kind=kind, options=options: getattr(_import()[1], f"{kind}_pool2d")(
        v.odd, **options)) for kind in ("max", "avg") for number, options in enumerate((
            {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 3, "stride": 2, "ceil_mode": True}, {"kernel_size": 2, "stride": 2, "ceil_mode": True},
            {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0], "ceil_mode": True},
            {"kernel_size": 3, "stride": 2, "padding": "SAME"}, {"kernel_size": 3, "padding": "VALID"},
            {"kernel_size": 3, "stride": 2, "padding": [1, 0, 0, 1]}))},
    "avg with padding": lambda v: [_import()[1].avg_pool2d(v.odd, 3, 2, 1, exclusive=False, ceil_mode=ceil)
                                   for ceil in (False, True)],
    "adaptive": lambda v: [call(v.odd, size) for call in (
        _import()[1].adaptive_avg_pool2d, _import()[1].adaptive_max_pool2d) for size in (1, [7, 1], [3, 2], [7, 5])],
    "max with mask": lambda v: _import()[1].max_pool2d(v.x, 2, 2, return_mask=True)[0],
    "nearest": lambda v: [_import()[1].interpolate(v.odd, **options, mode="nearest") for options in (
        {"scale_factor": 2}, {"size": [14, 10]}, {"size": [9, 4]}, {"scale_factor": [1.5, 2.5]}, {"size": [3, 3]})],
    "nearest with corners": lambda v: _one_op("nearest_interp_v2", {"X": v.odd}, {
        "out_h": 9, "out_w": 12, "scale": [], "align_corners": True, "data_layout": "NCHW",
        "interp_method": "nearest"}, "float32"),
    **{mode: (lambda v, mode=mode: [_import()[1].interpolate(v.odd, mode=mode, **options) for options in (
        {"size": [14, 10]}, {"size": [9, 4]}, {"size": [9, 12], "align_corners": True}, {"scale_factor": 2.0},
        {"scale_factor": [1.5, 2.5], "align_corners": True})]) for mode in ("bilinear", "bicubic")},
    "bilinear, asymmetric": lambda v: [_import()[1].interpolate(v.odd, size, mode="bilinear", align_mode=1)
                                       for size in ([14, 10], [9, 4])],
    "a computed size": lambda v: [_import()[1].interpolate(v.odd, _import()[0].shape(v.x)[2:] + 3, mode=mode)
                                  for mode in ("nearest", "bilinear")],
    "a computed factor": lambda v: _import()[1].interpolate(v.odd, scale_factor=v.weight(1, low=1.5) * 1.0),
    "grid_sample": lambda v: [_import()[1].grid_sample(v.x, v.grid, mode, padding, align)
                              for mode in ("bilinear", "nearest") for padding in ("zeros", "border", "reflection")
                              for align in (True, False)],
    "pixel_shuffle": lambda v: _import()[1].pixel_shuffle(v.x, 2),
    # shapes
    "reshape": lambda v: [_import()[0].reshape(v.x, shape) for shape in ([-1, 144], [0, 4, 36], [-1, 6], [0, -1, 12])],
    "reshape to the batch": lambda v: [
        _import()[0].reshape(v.x, [_import()[0].shape(v.x)[0], 12, 12]),
        _import()[0].reshape(v.x, _import()[0].concat([_import()[0].shape(v.x)[:2], _import()[0].full([1], 36, "int32")]))],
    "flatten": lambda v: [v.x.flatten(), v.x.flatten(1), v.x.flatten(0, 1), v.x.flatten(1, 2), v.x.flatten(-2)],
    "transpose": lambda v: v.x.transpose([0, 2, 3, 1]),
    "unsqueeze": lambda v: [v.s.unsqueeze(axis) for axis in (0, 1, -1, [1, 2], [0, -1], [2, 0], [-1, 1])],
    "squeeze": lambda v: [v.s.unsqueeze([1, 3]).squeeze(axis) for axis in (1, -1, [1, 3], [1, 2], None)[:4]]
    + [v.fixed[:, :1].squeeze(), v.fixed.squeeze([0])],
    "concat": lambda v: [_import()[0].concat([v.x, v.y, v.x], axis) for axis in (0, 1, -1)],
    "stack": lambda v: [_import()[0].stack([v.x, v.y], axis) for axis in (0, 2, -1)],
    "split": lambda v: [*_import()[0].split(v.x, 2, 1), *_import()[0].split(v.x, [1, 2, -1], -1),
                        *_import()[0].split(v.weight(6, 4), [2, 4])],
    "split of the batch": lambda v: _import()[0].split(_import()[0].concat([v.s, v.s]), 2, 0),
    "unbind": lambda v: [*_import()[0].unbind(v.t, 1), *_import()[0].unstack(v.x, 1)],
    "slice": lambda v: [v.x[:, 1:3], v.x[:, -1], v.x[:, :, 2:100], v.x[0], v.weight(6, 8)[2:4], v.x[:, 0, 1:-1, 3]],
    "a computed slice": lambda v: v.t[:, : _import()[0].shape(v.t)[2] - 5],
    "strided_slice": lambda v: [v.x[:, :, ::2, 1::3], v.x[:, :, ::-1], v.x[:, :, 4:1:-2, 1], v.x[..., -2::-1]]
    + [_import()[0].strided_slice(v.x, [2, 3], [-1, 0], [-100, 5], [-1, 2])],
    "flip": lambda v: [v.x.flip([2]), v.x.flip([1, -1])],
    "roll": lambda v: [v.x.roll(2, 2), v.x.roll([1, -2], [2, 3]), v.t.roll(3)],
    "tile": lambda v: [v.s.tile([1, 2]), v.s.tile([2]), v.s.tile([2, 1, 3]), v.b.tile([1, 2])],
    "a computed tile": lambda v: _import()[0].tile(v.weight(1, 4), [_import()[0].shape(v.x)[0], 1]),
    "expand": lambda v: [v.s.expand([2, -1, 5]), v.x[:, :1].expand([-1, 3, 6, 6]), v.weight(1, 4).expand([3, 4]),
                         v.b.unsqueeze(1).expand([-1, 2, 5])],
    "expand to the batch": lambda v: [v.weight(1, 4).expand([_import()[0].shape(v.x)[0], 4]),
                                      v.weight(1, 4, 6, 6).expand_as(v.x)],
    "pad": lambda v: [_import()[1].pad(v.x, [0, 0, 1, 2, 0, 3, 2, 0], value=1.5), _import()[1].pad(v.s, [0, 0, 1, 2])],
    "pad3d": lambda v: [_import()[1].pad(v.x, [1, 2, 0, 3], mode=mode) for mode in ("constant", "reflect", "replicate")]
    + [_import()[1].pad(v.x, [1, 2, 0, 3], value=-2.0), _import()[1].pad(v.volume, [1, 0, 2, 1, 0, 3], data_format="NCDHW")],
    "triangle": lambda v: [v.t.tril(), v.t.triu(1), v.t.tril(-1)],
    # indices
    "gather": lambda v: [
        _import()[0].gather(v.x, v.rows, 1), _import()[0].gather(v.x, v.rows.unsqueeze(1), 1),
        _import()[0].gather(v.whole, v.i.flatten()), _import()[0].gather(v.whole, v.rows[0], 0),
        _import()[0].gather(v.x, _import()[0].assign(np.array([5, 0])), 3)],
    "gather_nd": lambda v: _import()[0].gather_nd(v.whole, v.i.unsqueeze(-1)),
    "index_select": lambda v: _import()[0].index_select(v.x, v.rows, axis=1),
    "index_sample": lambda v: _import()[0].index_sample(v.s, v.i),
    "take_along_axis": lambda v: [
        _import()[0].take_along_axis(v.s, v.i, 1), _import()[0].take_along_axis(v.s, v.i[:, :3], -1, broadcast=False)],
    "put_along_axis": lambda v: _one_op(
        "put_along_axis", {"Input": v.s, "Index": _import()[0].argsort(v.s)[:, :3], "Value": v.t[:, :3, 0]},
        {"Axis": 1, "Reduce": "add"}, "float32", "Result"),
    "scatter": lambda v: [_import()[0].scatter(v.whole, v.rows, v.weight(3, 5)),
                          _import()[0].scatter(v.whole, v.rows, v.weight(3, 5), overwrite=False),
                          _import()[0].scatter(v.whole, v.i[0, :3] * 0 + 1, v.weight(3, 5), overwrite=False)],
    "scatter_nd_add": lambda v: [
        _import()[0].scatter_nd_add(v.whole, v.i.unsqueeze(-1)[0], v.weight(5, 5)),
        _import()[0].scatter_nd(v.i.unsqueeze(-1)[0], v.weight(5), [7])],
    "one_hot": lambda v: _import()[1].one_hot(v.i, 6),
    "embedding": lambda v: [_import()[1].embedding(v.i, v.weight(4, 6)),
                            _import()[1].embedding(v.i, v.weight(4, 6), padding_idx=1)],
    "where": lambda v: [_import()[0].where(v.b, v.s, v.weight(5)), _import()[0].where(v.s > 0, v.s, v.s * 2)],
    "nonzero": lambda v: _import()[0].nonzero(v.i),
    # constants and types
    "cast": lambda v: [_import()[0].cast(v.x, "int32"), _import()[0].cast(v.i, "float32"), _import()[0].cast(v.b, "int64"),
                       _import()[0].cast(v.x, "bool"), v.x + _import()[0].cast(_import()[0].assign(np.array([3])), "float32")],
    "shape": lambda v: [_import()[0].shape(v.x), _import()[0].shape(v.x)[2] * 2, _import()[0].numel(v.x)],
    "range": lambda v: [v.x[0, 0, 0] + _import()[0].arange(0, 6, 1, "float32"),
                        _import()[0].arange(0, _import()[0].shape(v.x)[0] * 3, 2)],
    "fill_constant": lambda v: [
        v.x + _import()[0].full([6], 2.5), v.i + _import()[0].full([1], 2**24 + 1, "int64"), v.b & _import()[0].full([5], True, "bool"),
        _import()[0].full([_import()[0].shape(v.x)[0], 3], 1.5), _import()[0].full([2, 2], v.weight(1))[:1]],
    "fill_constant_batch_size_like": lambda v: [
        _one_op("fill_constant_batch_size_like", {"Input": source}, {
            "shape": [7, -1, 2], "value": 1.5, "str_value": "1.5", "dtype": 5, "input_dim_idx": 0, "output_dim_idx": 1},
            "float32") for source in (v.x, v.fixed)],
    "fill_any_like": lambda v: [_import()[0].full_like(v.x, 2.5), _import()[0].zeros_like(v.i), _import()[0].ones_like(v.b),
                                _import()[0].full_like(v.x, 3, "int64")],
    "assign": lambda v: [_import()[0].assign(v.x), v.i + _import()[0].assign(np.arange(5))],
    "eye": lambda v: v.t[:, :, :5] + _import()[0].eye(5),
    "linspace": lambda v: v.s + _import()[0].linspace(0, 1, 5),
    "meshgrid": lambda v: _import()[0].meshgrid(v.rows, v.rows + 1),
    # products
    "matmul": lambda v: [
        _import()[0].matmul(v.x, v.y, transpose_y=True), _import()[0].matmul(v.x, v.y, transpose_x=True),
        _import()[0].matmul(v.t, v.weight(8, 3)), _import()[0].matmul(v.t, v.weight(3, 8), transpose_y=True),
        _import()[0].matmul(v.t, v.weight(8)), _import()[0].matmul(v.weight(5), v.t), _import()[0].matmul(v.x, v.weight(6, 2)),
        _import()[0].matmul(v.s, v.s, transpose_x=True)],
    "bmm": lambda v: _import()[0].bmm(v.t, v.t.transpose([0, 2, 1])),
    "legacy products": lambda v: [
        _one_op("mul", {"X": v.t, "Y": v.weight(8, 3)}, {"x_num_col_dims": 2, "y_num_col_dims": 1}, "float32"),
        _one_op("mul", {"X": v.x, "Y": v.weight(4, 36, 3)}, {"x_num_col_dims": 1, "y_num_col_dims": 2}, "float32"),
        _one_op("matmul", {"X": v.t, "Y": v.t}, {"transpose_X": False, "transpose_Y": True, "alpha": 0.5}, "float32")],
    "conv2d": lambda v: [
        _import()[1].conv2d(v.x, v.weight(5, 4, 3, 3), v.weight(5), 2, 1), _import()[1].conv2d(
            v.x, v.weight(6, 2, 3, 3), None, 1, [1, 0, 2, 1], 2, 2),
        _import()[1].conv2d(v.odd, v.weight(6, 1, 3, 3), v.weight(6), 2, "SAME", groups=3),
        _import()[1].conv2d(v.x, v.weight(2, 4, 3, 3) * 2, None, 1, "SAME", 2)],
    "conv2d_transpose": lambda v: [
        _import()[1].conv2d_transpose(v.odd, v.weight(3, 5, 3, 3), v.weight(5), 2, 1),
        _import()[1].conv2d_transpose(v.odd, v.weight(3, 5, 3, 3), None, 2, 1, 1),
        _import()[1].conv2d_transpose(v.x, v.weight(4, 3, 2, 4), v.weight(6), [2, 3], [0, 1, 1, 2], groups=2, dilation=2),
        _import()[1].conv2d_transpose(v.odd, v.weight(3, 2, 3, 3), None, 2, output_size=[16, 11]),
        _import()[1].conv2d_transpose(v.odd, v.weight(3, 2, 3, 3), None, 2, "SAME")],
    "depthwise_conv2d_transpose": lambda v: _import()[1].conv2d_transpose(
        v.odd, v.weight(3, 1, 4, 4), v.weight(3), 2, 1, groups=3),
    "conv2d_transpose and batch_norm": lambda v: [_import()[1].batch_norm(
        _import()[1].conv2d_transpose(v.x, v.weight(4, 6 // groups, 2, 2), v.weight(6), 2, groups=groups),
        v.weight(6), v.weight(6, low=0.5), v.weight(6), v.weight(6)) for groups in (1, 2)],
}  # fmt: skip


# Several in one program, which takes far less time than one program for each.
GROUPS = [list(CASES)[first : first + 8] for first in range(0, len(CASES), 8)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_rules_compute_what_paddle_computes(tmp_path: Path, names: list[str]) -> None:
    check(tmp_path, {name: CASES[name] for name in names})


def test_every_rule_is_compared() -> None:
    import paddle

    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
            inputs = Inputs()
            for program_of in CASES.values():
                program_of(inputs)
        compared = {op.type for op in program.global_block().ops}
    # These are other names of ops that are compared, in older programs and in those of Paddle's passes.
    assert set(RULES) - compared == {"top_k", "share_data"}


def described(values: Any) -> dict[str, tuple[str, list[int | str]]]:
    """Return name -> element type and sizes of the inputs or outputs of an ONNX graph."""
    return {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_a_fixed_batch_stays_fixed_and_inputs_keep_their_types(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "model", {"": lambda v: [v.fixed * 2, v.rows + 1]})
    lowered = lower(model, tmp_path / "model.onnx")
    graph = onnx.load(lowered.path).graph
    assert (graph.name, lowered.batch) == ("detector", 1)
    assert described(graph.input) == {"fixed": ("float32", [1, 4, 6, 6]), "rows": ("int64", [3])}
    assert lower(model, tmp_path / "same.onnx", batch=1).batch == 1
    with pytest.raises(UserError, match=r"batch is 4, but .* input fixed is \[1, 4, 6, 6\], expected 1;") as raised:
        lower(model, tmp_path / "four.onnx", batch=4)
    assert "\n" not in str(raised.value) and not (tmp_path / "four.onnx").exists()


def test_an_open_batch_is_fixed_where_it_is_open(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "model", {"": lambda v: [v.x * 2, v.i + v.k, v.b & v.c, v.whole + 1]})
    lowered = lower(model, tmp_path / "model.onnx")
    assert lowered.batch is None
    inputs = described(onnx.load(lowered.path).graph.input)
    assert inputs["x"] == ("float32", ["N", 4, 6, 6]) and inputs["i"] == ("int64", ["N", 5])
    assert inputs["b"] == ("bool", ["N", 5]) and inputs["whole"] == ("float32", [4, 5])
    inputs = described(onnx.load(lower(model, tmp_path / "two.onnx", batch=2).path).graph.input)
    assert inputs["x"] == ("float32", [2, 4, 6, 6]) and inputs["whole"] == ("float32", [4, 5])


def test_outputs_keep_their_names_and_types(tmp_path: Path) -> None:
    model, inputs, _ = saved(tmp_path / "model", {"": lambda v: [v.x, v.s > 0, v.i, v.t.sum()]})
    with static_mode():
        names = [target.name for target in StaticGraph.load(model).fetch_targets]
    outputs = described(onnx.load(lower(model, tmp_path / "model.onnx").path).graph.output)
    assert list(outputs) == names
    assert [kind for kind, _ in outputs.values()] == ["float32", "bool", "int64", "float32", "float32"]
    assert [len(sizes) for _, sizes in outputs.values()] == [4, 2, 2, 0, 1]


@pytest.mark.parametrize(
    ("names", "program_of"),
    [
        (["bbox", "bbox_num"], lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.i[:, 0]]),
        (None, lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.s[:, 0]]),  # no number of boxes
        (None, lambda v: [v.x.reshape([-1, 8]) * v.weight(1), v.i[:, 0]]),  # no boxes
        (None, lambda v: [v.x.reshape([-1, 6]) > v.weight(1), v.i[:, 0]]),
        (None, lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.i[:, 0], v.i]),
    ],
)
def test_only_a_detector_is_renamed(tmp_path: Path, names: list[str] | None, program_of: Callable) -> None:
    model, inputs, _ = saved(tmp_path / "model", {"": program_of}, parameter=False)
    lowered = lower(model, tmp_path / "model.onnx")
    with static_mode():
        names = names or [target.name for target in StaticGraph.load(model).fetch_targets]
    assert [output.name for output in onnx.load(lowered.path).graph.output] == names
    feeds = [inputs.values(2)]
    for one, other in zip(in_paddle(model, feeds)[0], in_onnxruntime(lowered.path, feeds)[0]):
        np.testing.assert_array_equal(one, other)
        assert other.dtype == (np.int32 if names[0] == "bbox" and other.ndim == 1 else one.dtype)


def _suppressed(v: Inputs) -> Any:
    import paddle

    helper = paddle.base.layer_helper.LayerHelper("multiclass_nms3")
    boxes, index, count = (helper.create_variable_for_type_inference(kind) for kind in ("float32", "int32", "int32"))
    helper.append_op(
        type="multiclass_nms3",
        inputs={"BBoxes": v.t[:, :, :4], "Scores": v.t[:, :3, :5]},
        outputs={"Out": boxes, "Index": index, "NmsRoisNum": count},
        attrs={"background_label": -1, "score_threshold": 0.1, "nms_top_k": 4, "nms_threshold": 0.5, "keep_top_k": 4},
    )
    return [boxes, count]


@pytest.mark.parametrize(
    ("program_of", "words"),
    [
        (_suppressed, "op multiclass_nms3 .* non-maximum suppression has no rule"),
        (lambda v: _import()[0].sinh(v.x), "op sinh .* no rule for it"),
        (lambda v: _import()[1].avg_pool2d(v.x, 2, data_format="NHWC"), "its layout is NHWC, expected NCHW"),
        (lambda v: _import()[1].pad(v.x, [1, 1, 1, 1], mode="circular"), "its mode is circular, .* needs --opset 19"),
        (lambda v: _import()[1].grid_sample(v.volume, v.weight(1, 2, 2, 2, 3)), "it samples volumes"),
    ],
    ids=["nms", "sinh", "layout", "mode", "volume"],
)
def test_what_has_no_rule_is_one_line(tmp_path: Path, program_of: Callable, words: str) -> None:
    model, _, _ = saved(tmp_path / "model", {"": program_of})
    with pytest.raises(UserError, match=words) as raised:
        lower(model, tmp_path / "model.onnx")
    assert "\n" not in str(raised.value) and not (tmp_path / "model.onnx").exists()


def test_half_precision_leaves_out_what_has_none(tmp_path: Path) -> None:
    """Celu, sums by indices and the factors of a Resize are FP32 in the specification or in ONNX Runtime."""

    def program_of(v: Inputs) -> list[Any]:
        paddle, functional = _import()
        grown = functional.interpolate(functional.celu(v.x), scale_factor=v.weight(1, low=1.5) * 1.0)
        added = paddle.scatter_nd_add(v.whole, v.i.unsqueeze(-1)[0], v.weight(5, 5))
        return [paddle.matmul(grown.mean([2, 3]), v.weight(4, 2)), paddle.matmul(added, v.weight(5, 2))]

    model, inputs, _ = saved(tmp_path / "model", {"": program_of})
    lowered = lower(model, tmp_path / "model.onnx", float16=True)
    feeds = [inputs.values(1)]
    for one, other in zip(in_paddle(model, feeds)[0], in_onnxruntime(lowered.path, feeds)[0]):
        np.testing.assert_allclose(other, one, rtol=0.02, atol=0.02)
        assert other.dtype == np.float32
