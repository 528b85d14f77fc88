"""Models of one INT8 op, small enough to be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def small_model(directory: Path, kind: str, after: str = "", least_scale: float = 0.2) -> InferenceModel:
    """Save one INT8 op with Q/DQ in ACT's format; its input is ``image`` [N, 4, 6, 6].

    Args:
        directory: the model folder; it is created.
        kind: ``conv2d``, ``depthwise_conv2d``, ``matmul_v2``, ``conv2d_transpose``, ``grouped_transpose`` (the same
            in two groups) or ``depthwise_conv2d_transpose``.
        after: the ops that follow: nothing, ``batch_norm`` (of convolutions), ``bias``, ``residual`` or
            ``bias_residual``.
        least_scale: scale of the first channel's weights; those of the others are 0.2 to 2.
    """
    import paddle

    rng = np.random.default_rng(3)
    directory.mkdir(exist_ok=True)
    shapes = {
        "conv2d": (5, 4, 3, 3), "depthwise_conv2d": (4, 1, 3, 3), "matmul_v2": (6, 5),
        "conv2d_transpose": (4, 5, 3, 3), "grouped_transpose": (4, 3, 3, 3), "depthwise_conv2d_transpose": (4, 1, 3, 3),
    }  # fmt: skip
    groups = {"depthwise_conv2d": 4, "grouped_transpose": 2, "depthwise_conv2d_transpose": 4}.get(kind, 1)
    shape, transposed = shapes[kind], "transpose" in kind
    # PaddleSlim's quant_axis of transposed convolutions is 1: the scales of their groups are shared.
    axis = 1 if kind == "matmul_v2" or transposed else 0
    channels = shape[axis] * (groups if transposed else 1)
    kind = "conv2d_transpose" if kind == "grouped_transpose" else kind
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
            image = paddle.static.data("image", [-1, 4, 6, 6], "float32")
            block = program.global_block()
            graph = StaticGraph(program, ["image"], [], scope, paddle.static.Executor(paddle.CPUPlace()))

            def append(kind: str, inputs: dict, outputs: dict, attrs: dict) -> None:
                block.append_op(type=kind, inputs=inputs, outputs=outputs, attrs=attrs)

            def tensor(name: str):
                return block.create_var(name=name, dtype="float32")

            def pair(name: str, value, scale: np.ndarray, quant_axis: int, weight: bool):
                inputs = {
                    "Scale": graph.add_parameter(f"{name}@scale", scale),
                    "ZeroPoint": graph.add_parameter(f"{name}@zero", np.zeros_like(scale)),
                }
                attrs = {"quant_axis": quant_axis, "bit_length": 8}
                if not weight:
                    rounded = tensor(f"{name}.quantized")
                    append("quantize_linear", {"X": value, **inputs}, {"Y": rounded}, attrs)
                    value = rounded
                result = tensor(f"{name}.dequantized")
                append("dequantize_linear", {"X": value, **inputs}, {"Y": result}, attrs)
                return result

            scales = rng.uniform(0.2, 2, shape[axis]).astype(np.float32)
            scales[0] = least_scale
            integers = graph.add_parameter("w", rng.integers(-127, 128, shape).astype(np.float32))
            weights = pair("w", integers, scales, axis, True)
            values = pair("image", image, np.array([2.5], np.float32), -1, False)
            output = tensor("result")
            if kind == "matmul_v2":
                first, second, result = "X", "Y", "Out"
                attributes = {"trans_x": False, "trans_y": False}
            else:
                first, second, result = "Input", "Filter", "Output"
                attributes = {
                    "strides": [2, 2], "paddings": [1, 1], "dilations": [1, 1], "padding_algorithm": "EXPLICIT",
                    "groups": groups, "data_format": "NCHW",
                }  # fmt: skip
            append(kind, {first: values, second: weights}, {result: output}, attributes)
            if after in ("bias", "bias_residual"):
                bias, added = graph.add_parameter("bias", rng.normal(size=channels).astype(np.float32)), tensor("added")
                along = -1 if kind == "matmul_v2" else 1
                append("elementwise_add", {"X": output, "Y": bias}, {"Out": added}, {"axis": along})
                output = added
            if after in ("residual", "bias_residual"):  # the float output of another op of this kind
                filters = graph.add_parameter("filters", rng.normal(size=shape).astype(np.float32))
                other, total = tensor("other"), tensor("total")
                append(kind, {first: image, second: filters}, {result: other}, attributes)
                append("elementwise_add", {"X": output, "Y": other}, {"Out": total}, {"axis": -1})
                output = total
            if after == "batch_norm":
                normed = tensor("normed")
                factors = {
                    "Scale": rng.uniform(-1, 1, channels), "Bias": rng.normal(size=channels),
                    "Mean": rng.normal(size=channels), "Variance": rng.uniform(0.5, 2, channels),
                }  # fmt: skip
                slots = {slot: graph.add_parameter(slot, value.astype(np.float32)) for slot, value in factors.items()}
                unused = {slot: tensor(slot) for slot in ("SavedMean", "SavedVariance")}
                append(
                    "batch_norm", {"X": output, **slots},
                    {"Y": normed, "MeanOut": slots["Mean"], "VarianceOut": slots["Variance"], **unused},
                    {"epsilon": 1e-5, "is_test": True, "data_layout": "NCHW", "use_global_stats": True},
                )  # fmt: skip
                output = normed
            graph.fetch_targets.append(output)
            return graph.save(directory)


def in_executor(model: InferenceModel, image: np.ndarray) -> np.ndarray:
    """Return the outputs computed by Paddle's executor with the Q/DQ unchanged."""
    with static_mode():
        graph = StaticGraph.load(model)
        import paddle

        with paddle.static.scope_guard(graph.scope):
            return graph.executor.run(graph.program, feed={"image": image}, fetch_list=graph.fetch_targets)[0]
