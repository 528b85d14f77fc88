"""Rewrites before the ONNX export: positions of Q/DQ, reshapes and transposes, masks, half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.onnx_export.float_ops.registry import add_op
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op, QuantizedTensor, Source
from act_pipeline.onnx_export.rewrites import deformable_sampling
from act_pipeline.onnx_export.rewrites.channels_last import rewrite_layout_conversions
from act_pipeline.onnx_export.rewrites.constants_in_float16 import store_constants_in_float16
from act_pipeline.onnx_export.rewrites.deformable_sampling import sum_by_level
from act_pipeline.onnx_export.rewrites.float16 import to_float16
from act_pipeline.onnx_export.rewrites.qdq_placement import round_early

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SCALE = np.array(0.1, np.float32)


def op(kind: str, inputs: str, output: str, **attrs: object) -> Op:
    return Op(kind, {"X": inputs.split()}, {"Out": [output]}, attrs)


def source(ops: list[Op], shapes: dict[str, tuple[int, ...]], outputs: str) -> Source:
    """Return a program with the float32 input ``x``."""
    made = Source(ops=ops, shapes=dict(shapes), inputs=["x"], outputs=outputs.split())
    made.dtypes = {name: np.float32 for name in shapes}
    return made


def write(program: Source, opset: int = 17) -> onnx.ModelProto:
    build = GraphBuilder(program, "int8", opset)
    for step in program.ops:
        add_op(build, step)
    for name in program.outputs:
        build.nodes.append(onnx.helper.make_node("Identity", [build.get(name)], [name], name=name))
    sizes = [size if size >= 0 else "N" for size in program.shapes["x"]]
    graph = onnx.helper.make_graph(
        build.nodes,
        "test",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes)],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in program.outputs],
        list(build.initializers.values()),
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.op_type != "Identity"]


def attention_like() -> Source:
    """Return relu, two data movements, and a quantized reader (adding the pair to itself replaces a matmul)."""
    program = source(
        [
            op("relu", "x", "a"),
            op("transpose2", "a", "b", axis=[0, 2, 1]),
            op("reshape2", "b", "c", shape=[-1, 6]),
            op("elementwise_add", "c.dq", "y"),
        ],
        {"x": (-1, 2, 3), "a": (-1, 2, 3), "b": (-1, 3, 2), "c": (-1, 6), "c.dq": (-1, 6), "y": (-1, 6)},
        "y",
    )
    program.ops[-1].inputs["Y"] = ["c.dq"]
    program.quantized["c.dq"] = QuantizedTensor("c", SCALE)
    return program


def test_a_rounding_moves_up_past_moves_and_computes_the_same() -> None:
    x = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    late, early = attention_like(), attention_like()
    round_early(early)
    assert early.rounded == {"b", "c"}
    written = write(early)
    assert kinds(written)[:4] == ["Relu", "QuantizeLinear", "DequantizeLinear", "Transpose"]
    assert kinds(written).count("QuantizeLinear") == 1
    np.testing.assert_array_equal(run(written, x)[0], run(write(late), x)[0])


@pytest.mark.parametrize("reader", ["op", "output", "scale"])
def test_a_rounding_stays_where_something_reads_the_tensor_unrounded(reader: str) -> None:
    program = attention_like()
    if reader == "op":
        program.ops.append(op("relu", "b", "z"))
        program.shapes["z"] = (-1, 3, 2)
    elif reader == "output":
        program.outputs.append("b")
    else:
        program.quantized["b.dq"] = QuantizedTensor("b", SCALE * 2)
    round_early(program)
    assert program.rounded == {"c"}


def test_a_rounding_moves_past_the_largest_but_not_past_an_average() -> None:
    for kind, expected in (("max", {"p"}), ("avg", set())):
        program = source(
            [op("relu", "x", "a"), op("pool2d", "a", "p", pooling_type=kind)],
            {"x": (1, 1, 4, 4), "a": (1, 1, 4, 4), "p": (1, 1, 2, 2)},
            "",
        )
        program.quantized["p.dq"] = QuantizedTensor("p", SCALE)
        round_early(program)
        assert program.rounded == expected, kind


def test_concatenated_parts_are_rounded_each_by_the_one_scale() -> None:
    program = source(
        [op("relu", "x", "a"), op("sigmoid", "x", "b"), op("concat", "a b", "c", axis=1), op("scale", "c.dq", "y")],
        {name: (-1, 2) for name in "xab"} | {name: (-1, 4) for name in ("c", "c.dq", "y")},
        "y",
    )
    program.ops[-1].attrs = {"scale": 2.0, "bias": 0.0, "bias_after_scale": True}
    program.quantized["c.dq"] = QuantizedTensor("c", SCALE)
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    before = run(write(program), x)[0]
    round_early(program)
    written = write(program)
    assert kinds(written).count("QuantizeLinear") == 2 and kinds(written).index("Concat") > 5
    np.testing.assert_array_equal(run(written, x)[0], before)


@pytest.mark.parametrize("case", ["map to sequence", "sequence to map", "values"])
def test_a_change_of_layout_is_said_in_four_dimensions(case: str) -> None:
    steps, shapes, size = {
        "map to sequence": (
            [op("flatten_contiguous_range", "x", "a", start_axis=2, stop_axis=3), op("transpose2", "a", "y", axis=[0, 2, 1])],
            {"x": (-1, 5, 2, 3), "a": (-1, 5, 6), "y": (-1, 6, 5)},
            (2, 5, 2, 3),
        ),
        "sequence to map": (
            [op("transpose2", "x", "a", axis=[0, 2, 1]), op("reshape2", "a", "y", shape=[-1, 5, 2, 3])],
            {"x": (-1, 6, 5), "a": (-1, 5, 6), "y": (-1, 5, 2, 3)},
            (2, 6, 5),
        ),
        "values": (
            [op("transpose2", "x", "a", axis=[0, 2, 3, 1]), op("reshape2", "a", "y", shape=[-1, 4, 2, 3])],
            {"x": (-1, 6, 7, 4), "a": (-1, 7, 4, 6), "y": (-1, 4, 2, 3)},
            (2, 6, 7, 4),
        ),
    }[case]  # fmt: skip
    plain, said = source(steps, shapes, "y"), source(list(steps), shapes, "y")
    rewrite_layout_conversions(said)
    x = np.random.default_rng(0).normal(size=size).astype(np.float32)
    turns = [list(node.attribute[0].ints) for node in write(said).graph.node if node.op_type == "Transpose"]
    assert turns in ([[0, 2, 3, 1]], [[0, 3, 1, 2]])
    np.testing.assert_array_equal(run(write(said), x)[0], run(write(plain), x)[0])


def test_a_move_with_two_readers_is_left_alone() -> None:
    program = source(
        [op("flatten_contiguous_range", "x", "a", start_axis=2, stop_axis=3), op("transpose2", "a", "y", axis=[0, 2, 1])],
        {"x": (-1, 5, 2, 3), "a": (-1, 5, 6), "y": (-1, 6, 5)},
        "y a",
    )  # fmt: skip
    rewrite_layout_conversions(program)
    assert [step.type for step in program.ops] == ["flatten_contiguous_range", "transpose2"]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_samples_of_each_level_are_added_up_where_they_are(stacked: bool) -> None:
    size = (-1, 5, 7, 2)
    beside = (
        [op("stack", "a b", "st", axis=-2), op("flatten_contiguous_range", "st", "c", start_axis=3, stop_axis=4)]
        if stacked
        else [op("concat", "a b", "c", axis=-1)]
    )
    total = op("reduce_sum", "p", "y", dim=[-1], keep_dim=False)
    steps = [op("relu", "x", "a"), op("sigmoid", "x", "b"), *beside, op("elementwise_mul", "c", "p"), total]
    steps[-2].inputs["Y"] = ["w"]
    shapes = {"x": size, "a": size, "b": size, "st": (-1, 5, 7, 2, 2), "c": (-1, 5, 7, 4), "p": (-1, 5, 7, 4)}
    plain, summed = (source([*steps], {**shapes, "w": (1, 1, 7, 4), "y": (-1, 5, 7)}, "y") for _ in range(2))
    for program in (plain, summed):
        program.constants["w"] = np.random.default_rng(1).normal(size=(1, 1, 7, 4)).astype(np.float32)
    sum_by_level(summed)
    x = np.random.default_rng(0).normal(size=(3, 5, 7, 2)).astype(np.float32)
    assert kinds(write(plain)).count("Concat") == 1
    assert kinds(write(summed)).count("Concat") == 0 and kinds(write(summed)).count("ReduceSum") == 1
    np.testing.assert_allclose(run(write(summed), x)[0], run(write(plain), x)[0], rtol=1e-5, atol=1e-6)
    plain.outputs.append("c")
    sum_by_level(plain)
    assert kinds(write(plain)).count("Concat") == 1, "somebody else reads it"


def test_levels_with_different_numbers_of_points_are_summed_before_they_are_added() -> None:
    shapes = {"x": (-1, 5, 7, 2), "b": (-1, 5, 7, 4), "c": (-1, 5, 7, 6), "p": (-1, 5, 7, 6), "y": (-1, 5, 7)}
    steps = [op("concat", "x x", "b", axis=-1), op("concat", "x b", "c", axis=-1), op("elementwise_mul", "c", "p")]
    steps[-1].inputs["Y"] = ["w"]
    steps.append(op("reduce_sum", "p", "y", dim=[-1], keep_dim=False))
    plain, summed = (source([*steps], {**shapes, "w": (1, 1, 7, 6)}, "y") for _ in range(2))
    for program in (plain, summed):
        program.constants["w"] = np.random.default_rng(1).normal(size=(1, 1, 7, 6)).astype(np.float32)
    sum_by_level(summed)
    assert kinds(write(summed)).count("ReduceSum") == 2 and kinds(write(summed)).count("Concat") == 1
    x = np.random.default_rng(0).normal(size=(3, 5, 7, 2)).astype(np.float32)
    np.testing.assert_allclose(run(write(summed), x)[0], run(write(plain), x)[0], rtol=1e-5, atol=1e-6)


def test_large_constants_of_int8_files_are_stored_in_half_precision() -> None:
    rng = np.random.default_rng(3)
    constants = {
        "position": rng.normal(size=(1, 1024)).astype(np.float32),
        "small": rng.normal(size=(1, 1)).astype(np.float32),
        "huge": np.where(rng.random((1, 1024)) < 0.5, -3e38, 0).astype(np.float32),
        "tiny": (rng.normal(size=(1, 1024)) * 1e-7).astype(np.float32),
    }
    steps, read, shapes = [], "x", {"x": (-1, 1024), "x.dq": (-1, 1024)}
    for number, (name, value) in enumerate(constants.items()):
        steps.append(op("elementwise_add", read, f"y{number}"))
        steps[-1].inputs["Y"], read = [name], f"y{number}"
        shapes.update({name: value.shape, read: (-1, 1024)})
    program = source(steps, shapes, "y0 y3")
    program.constants.update(constants)
    before, proto = write(program), write(program)
    assert store_constants_in_float16(proto) == 1
    types = {tensor.name.split("/")[0]: tensor.data_type for tensor in proto.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert types == {"position": half, "small": single, "huge": single, "tiny": single}
    x = np.zeros((1, 1024), np.float32)
    (exact, _), (found, _) = run(before, x), run(proto, x)
    assert found.dtype == np.float32 and 0 < np.abs(found - exact).max() <= np.abs(exact).max() * 2.0**-11
    assert len(proto.SerializeToString()) < len(before.SerializeToString()) - 1900


def test_scales_stay_in_single_precision() -> None:
    program = source([op("relu", "x.dq", "y")], {"x": (-1, 600), "x.dq": (-1, 600), "y": (-1, 600)}, "y")
    scale = np.linspace(0.1, 0.2, 600, dtype=np.float32)
    program.quantized["x.dq"] = QuantizedTensor("w", scale, 1, np.ones((1, 600), np.int8))
    assert store_constants_in_float16(write(program)) == 0


@pytest.mark.parametrize(("mask", "kind"), [([1, 0, 1], ["Where"]), ([1, 1, 1], []), ([2, 0, 1], ["Mul"])])
def test_a_mask_is_a_choice(mask: list[int], kind: list[str]) -> None:
    program = source([op("elementwise_mul", "x", "y")], {"x": (-1, 3), "m": (3,), "y": (-1, 3)}, "y")
    program.ops[0].inputs["Y"] = ["m"]
    program.constants["m"] = np.array(mask, np.float32)
    written = write(program)
    assert kinds(written) == kind
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(written, x)[0], x * np.array(mask, np.float32))


def test_half_precision_keeps_a_scale_that_it_cannot_hold_above_zero() -> None:
    program = source([op("scale", "x.dq", "y")], {"x": (-1, 3), "x.dq": (-1, 3), "y": (-1, 3)}, "y")
    program.ops[0].attrs = {"scale": 1.0, "bias": 0.5, "bias_after_scale": True}
    program.quantized["x.dq"] = QuantizedTensor("x", np.array(1e-9, np.float32))
    proto = write(program, 19)
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["x.w", "x.w"], ["x.unused"], name="last"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "x.w"))
    proto.graph.node[-1].input[0] = proto.graph.node[-2].input[0]  # now a matmul: all is converted to FP16
    to_float16(proto)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scales = [constants[n.input[1]] for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    assert len(scales) == 1 and scales[0].dtype == np.float16 and scales[0] > 0


def test_half_precision_ends_after_the_last_matmul(tmp_path: Path) -> None:
    program = source(
        [op("relu", "x", "a"), op("matmul_v2", "a", "b"), op("sigmoid", "b", "c"), op("scale", "c", "y")],
        {"x": (-1, 3), "a": (-1, 3), "w": (3, 2), "b": (-1, 2), "c": (-1, 2), "y": (-1, 2)},
        "y",
    )
    program.ops[-1].attrs = {"scale": 1000.0, "bias": 0.0, "bias_after_scale": True}
    program.ops[1].inputs["Y"] = ["w"]
    program.constants["w"] = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    from act_pipeline.onnx_export.quantized_ops import matmul

    build = GraphBuilder(program, "int8", 17)
    for step in program.ops:
        matmul(build, step) if step.type == "matmul_v2" else add_op(build, step)
    graph = onnx.helper.make_graph(
        [*build.nodes, onnx.helper.make_node("Identity", [build.get("y")], ["y"], name="y")],
        "test",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])],
        list(build.initializers.values()),
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    before = run(proto, x)[0]
    to_float16(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert kinds(proto) == ["Cast", "Relu", "MatMul", "Cast", "Sigmoid", "Mul"]
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    matrix = next(node for node in proto.graph.node if node.op_type == "MatMul")
    product = next(node for node in proto.graph.node if node.op_type == "Mul")
    assert types[matrix.input[1]] == onnx.TensorProto.FLOAT16 and types[product.input[1]] == onnx.TensorProto.FLOAT
    after = run(proto, x)[0]
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, rtol=5e-3)
    assert np.abs(after - before).max() > 0


@pytest.mark.parametrize("traced", [False, True])
def test_points_are_sampled_before_queries(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write GridSample, product and sum of two levels, with the stack of Paddle or that of PyTorch."""
    monkeypatch.setattr(deformable_sampling, "_MANY_QUERIES", 5)
    rng = np.random.default_rng(2)
    shapes: dict[str, tuple[int, ...]] = {"x": (1, 3, 4, 4), "w": (1, 1, 5, 4), "y": (1, 3, 5), "p": (1, 3, 5, 4)}
    steps = []
    for level in "ab":
        sample = Op("grid_sampler", {"X": ["x"], "Grid": [f"g{level}"]}, {"Output": [level]}, {})
        sample.attrs = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}
        steps.append(sample)
        shapes.update({level: (1, 3, 5, 2), f"g{level}": (1, 5, 2, 2), f"u{level}": (1, 3, 5, 1, 2)})
        steps += [op("unsqueeze2", level, f"u{level}", axes=[3])] if traced else []
    if traced:
        steps += [op("concat", "ua ub", "st", axis=3), op("reshape2", "st", "c", shape=[1, 3, 5, 4])]
    else:
        steps += [op("concat", "a b", "c", axis=3)]
    steps += [op("elementwise_mul", "c", "p"), op("reduce_sum", "p", "y", dim=[-1], keep_dim=False)]
    steps[-2].inputs["Y"] = ["w"]
    shapes.update({"st": (1, 3, 5, 2, 2), "c": (1, 3, 5, 4)})
    constants = {name: rng.uniform(-1, 1, shapes[name]).astype(np.float32) for name in ("ga", "gb", "w")}
    written = []
    for rewrite in (False, True):
        program = source(
            [replace(step, inputs=dict(step.inputs), outputs=dict(step.outputs)) for step in steps], shapes, "y"
        )
        program.constants.update(constants)
        if rewrite:
            sum_by_level(program, queries_last=True)
        written.append(write(program))
    assert "Concat" in kinds(written[0]) and "Concat" not in kinds(written[1])
    sums = [node for node in written[1].graph.node if node.op_type == "ReduceSum"]
    axes = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in written[1].graph.initializer}
    assert [axes[node.input[1]] for node in sums] == [[2]]
    x = rng.normal(size=(1, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(written[1], x)[0], run(written[0], x)[0], rtol=1e-5, atol=1e-6)


def test_a_mask_of_attention_is_no_dequantization_to_openvino() -> None:
    """Run scores + (mask - 1) * 3.4e38, then softmax, in a model with Q/DQ elsewhere."""
    from act_pipeline.engines.onnx_runtimes.openvino import import_openvino
    from act_pipeline.onnx_export.rewrites.attention_masks import protect_masks

    pytest.importorskip("openvino")
    helper, numpy_helper, rng = onnx.helper, onnx.numpy_helper, np.random.default_rng(3)
    constants = {
        "lowest": np.float32(np.finfo(np.float32).min), "one": np.float32(1), "minus": np.float32(-1), "token": np.int64(1), "repeats": np.array([1, 2, 1, 1]),
        "half": np.float32(0.125),
        "s": np.float32(0.02), "z": np.array(128, np.uint8), "w": rng.normal(size=(8, 8)).astype(np.float32),
        "v": rng.normal(size=(1, 2, 6, 8)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        ("QuantizeLinear", "x s z", "q"), ("DequantizeLinear", "q s z", "dq"), ("MatMul", "dq w", "h"),
        ("Transpose", "h", "t"), ("MatMul", "h t", "product"), ("Mul", "product half", "scores"),
        ("Equal", "mask token", "e"), ("Tile", "e repeats", "tiled"), ("Cast", "tiled", "m"), ("Mul", "m minus", "negative"), ("Add", "negative one", "inverse"),
        ("Mul", "inverse lowest", "bias"),
        ("Add", "scores bias", "masked"), ("Softmax", "masked", "weights"), ("MatMul", "weights v", "y"),
    ]  # fmt: skip
    attrs = {"t": {"perm": [0, 1, 3, 2]}, "m": {"to": onnx.TensorProto.FLOAT}, "weights": {"axis": -1}}
    graph = helper.make_graph(
        [helper.make_node(kind, inputs.split(), [out], name=out, **attrs.get(out, {})) for kind, inputs, out in nodes],
        "attention",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 6, 8]),
         helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [1, 1, 6, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 6, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": rng.normal(size=(1, 2, 6, 8)).astype(np.float32), "mask": np.tril(np.ones((1, 1, 6, 6), np.int64))}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)[0]
    assert protect_masks(proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    core = import_openvino().Core()
    compiled = core.compile_model(
        core.read_model(proto.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled(feeds)[0], expected, rtol=1e-3, atol=1e-3)
