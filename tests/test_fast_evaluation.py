"""Evaluation within a compression: the fast engine rounds like the exact one; the float model is evaluated once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from one_op_model import in_executor, small_model

from act_pipeline.compress.judging import float_evaluation
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines import create_engine, machine
from act_pipeline.engines.paddle.int8_reference import use_onednn, with_onednn_rounding
from act_pipeline.evaluation import Evaluation, evaluate
from act_pipeline.evaluation.batches import NotFinite
from act_pipeline.graph.folding import fold_constants
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.parameters_file import read_parameters, write_parameters
from act_pipeline.graph.static_graph import StaticGraph, static_mode

REFERENCE = Judge("int8_reference", "paddle_onednn", "CPU", "")


def test_weights_are_dequantized_to_the_bit(demo, tmp_path: Path) -> None:
    model = demo.compressed.model
    values = read_parameters(
        with_onednn_rounding(model, tmp_path, integers=True), inspect_model(InferenceModel(tmp_path)).parameters
    )
    with static_mode():
        graph = StaticGraph.load(model)
        fold_constants(graph)
        assert len(values) > 100 and not any(value.dtype == np.int8 for value in values.values())
        for name, value in values.items():
            expected = graph.parameter(name)
            turned = value.shape != expected.shape or not np.array_equal(value, expected)  # square weights in the model
            np.testing.assert_array_equal(value, expected.T if turned else expected, err_msg=name)


def test_no_rounding_is_left_out_and_none_is_slow(demo, tmp_path: Path) -> None:
    before = inspect_model(demo.compressed.model).op_counts
    after = inspect_model(with_onednn_rounding(demo.compressed.model, tmp_path, integers=False)).op_counts
    assert after["quantize"] == before["quantize_linear"] > 50 and after["quantize_linear"] == 0
    assert after["dequantize"] == after["quantize"] and after["dequantize_linear"] == 0
    assert before["grid_sampler"] > 0 and after["grid_sampler"] == 0 and after["gather"] > before["gather"]


def test_every_convolution_of_the_sample_reads_integers(demo, tmp_path: Path) -> None:
    """The same holds for every matmul with a bias."""
    before = inspect_model(demo.compressed.model).op_counts
    model = with_onednn_rounding(demo.compressed.model, tmp_path, integers=True)
    kinds, counts = data_types(model), inspect_model(model).op_counts
    convolutions = counts["conv2d"] + counts["depthwise_conv2d"]
    assert kinds.count("int8") - counts["fc"] == convolutions > 50
    assert counts["fc"] == before["matmul_v2"] - counts["matmul_v2"] > 30
    assert 0 < counts["dequantize"] < counts["quantize"]  # tensors read only by convolutions are not dequantized


def data_types(model: InferenceModel) -> list[str]:
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc.FromString(model.model_path.read_bytes())
    ops = [op for op in program.blocks[0].ops if "conv2d" in op.type or op.type == "fc"]
    attributes = [attribute for op in ops for attribute in op.attrs]
    return [attribute.s for attribute in attributes if attribute.name == "mkldnn_data_type"]


@pytest.mark.skipif(not machine().avx512_vnni, reason="oneDNN is exact in INT8 only where the CPU has AVX512-VNNI")
@pytest.mark.parametrize(
    ("kind", "after"),
    [
        *((kind, after) for kind in ("conv2d", "depthwise_conv2d") for after in ("", "bias", "residual")),
        ("matmul_v2", "bias"),
        ("matmul_v2", "bias_residual"),
    ],
)
def test_a_product_of_integers_gives_what_paddle_gives(tmp_path: Path, kind: str, after: str) -> None:
    """Also if a channel's weights are nearly 0, so that its bias exceeds the range of int32."""
    import paddle

    model = small_model(tmp_path / "model", kind, after, least_scale=1e-8)
    (tmp_path / "onednn").mkdir()
    rewritten = with_onednn_rounding(model, tmp_path / "onednn", integers=True)
    assert data_types(rewritten).count("int8") == 1
    config = paddle.inference.Config(str(rewritten.model_path), str(rewritten.params_path))
    config.disable_glog_info()
    use_onednn(config, 1)
    image = np.random.default_rng(5).normal(scale=1.5, size=(2, 4, 6, 6)).astype(np.float32)  # some exceed the scale
    predictor = paddle.inference.create_predictor(config)
    predictor.get_input_handle("image").copy_from_cpu(image)
    predictor.run()
    found = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    np.testing.assert_allclose(found, in_executor(model, image), rtol=1e-5, atol=1e-5)


def test_onednn_rounds_as_paddle_does() -> None:
    """Ties, saturation at both ends, and values between."""
    import paddle

    scale = 127 / 16  # ties are then exact
    values = np.concatenate([np.arange(-140, 140, 0.25), np.random.default_rng(0).normal(0, 200, 5000)]) / 16
    values = values.astype(np.float32).reshape(1, 1, 1, -1)
    found = []
    with static_mode():
        for kind in ("linear", "onednn"):
            program, scope = paddle.static.Program(), paddle.static.Scope()
            with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
                block = program.global_block()
                x = paddle.static.data("x", values.shape, "float32")
                y = block.create_var(name="y", shape=values.shape, dtype="float32")
                z = block.create_var(name="z", shape=values.shape, dtype="float32")
                if kind == "linear":
                    inputs = {}
                    for name, value in (("Scale", scale), ("ZeroPoint", 0.0)):
                        inputs[name] = block.create_var(name=name, shape=[1], dtype="float32", persistable=True)
                        scope.var(name).get_tensor().set(np.float32([value]), paddle.CPUPlace())
                    attrs = {"quant_axis": -1, "bit_length": 8}
                    block.append_op(type="quantize_linear", inputs={"X": x, **inputs}, outputs={"Y": y}, attrs=attrs)
                    block.append_op(type="dequantize_linear", inputs={"X": y, **inputs}, outputs={"Y": z}, attrs=attrs)
                else:
                    attrs = {"Scale": 127 / scale, "use_mkldnn": True, "mkldnn_data_type": "float32"}
                    more = {"is_negative_input": True, "output_format": "NCHW"}
                    block.append_op(
                        type="quantize", inputs={"Input": x}, outputs={"Output": y}, attrs={**attrs, **more}
                    )
                    block.append_op(type="dequantize", inputs={"Input": y}, outputs={"Output": z}, attrs=attrs)
                executor = paddle.static.Executor(paddle.CPUPlace())
                found.append(executor.run(program, feed={"x": values}, fetch_list=["z"])[0])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_the_quick_engine_detects_as_the_exact_one(demo) -> None:
    reader = demo.reader()
    engines = {name: create_engine(name, demo.compressed.model, "int8", "CPU") for name in ("paddle", "int8_reference")}
    found = {name: evaluate(engine, reader, limit=40, progress=False) for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    assert abs(found["paddle"].map - found["int8_reference"].map) <= 0.01
    means = [evaluation.detections[:, 5].mean() for evaluation in found.values()]
    assert means[0] == pytest.approx(means[1], abs=0.005)


def test_an_evaluation_survives_models_of_nan(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the bias of the sampling points, an earlier bias, or the last one (the scores), in parallel engines."""
    monkeypatch.setattr("act_pipeline.compress.judging.judge.available_cpus", lambda: 2)
    assert REFERENCE.parallel == (2, 1)
    model = InferenceModel(tmp_path)
    model.model_path.write_bytes(demo.compressed.model.model_path.read_bytes())
    values = read_parameters(demo.compressed.model, inspect_model(demo.compressed.model).parameters)
    with static_mode(), contextlib.closing(StaticGraph.load(demo.compressed.model)) as graph:
        assert REFERENCE.survives_nan(graph)
        ops = graph.program.global_block().ops
        read = [name for op in ops for name in op.input_arg_names if op.type == "elementwise_add"]
    biases = [name for name in dict.fromkeys(read) if name in values and values[name].ndim == 1]
    sizes = [values[name].size for name in biases]
    # x and y of each point, followed by its weight.
    offsets = [name for name, size, after in zip(biases, sizes, sizes[1:]) if size == 2 * after][-1]
    reader, said = demo.reader(), []
    for name in (offsets, biases[len(biases) // 2], biases[-1]):
        write_parameters(model, {**values, name: np.full_like(values[name], np.nan)})
        try:
            REFERENCE.evaluate(model, "int8", reader, False, 4)
            said.append("")
        except NotFinite as error:
            said.append(str(error))
    assert "not finite" in said[-1], said


def test_parameters_are_written_as_they_were_read(demo, tmp_path: Path) -> None:
    model = demo.compressed.model
    copy = InferenceModel(tmp_path)
    copy.model_path.write_bytes(model.model_path.read_bytes())
    write_parameters(copy, read_parameters(model, inspect_model(model).parameters))
    assert copy.params_path.read_bytes() == model.params_path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / float_evaluation.FOLDER


def made(map_: float = 0.5) -> Evaluation:
    rows = np.random.default_rng(0).random((5, 7))
    return Evaluation(
        map_, 0.7, {"ap": map_}, ["a line"], {"cat": None, "dog": 0.1}, 3, 1, {"p50": 1.5}, 20.0, rows, [1, 2**60 + 1]
    )


def test_an_evaluation_comes_back_whole(cache: Path) -> None:
    key = ("sha256:a", "sha256:b", "paddle", "CPU", 2)
    first, was_there = float_evaluation.cached_evaluation(*key, made)
    again, is_there = float_evaluation.cached_evaluation(*key, lambda: pytest.fail("evaluated twice"))
    assert (was_there, is_there) == (False, True)
    np.testing.assert_array_equal(again.detections, first.detections)
    assert {**vars(again), "detections": 0} == {**vars(first), "detections": 0}
    assert again.image_ids == [1, 2**60 + 1]
    for place, other in enumerate(("sha256:c", "sha256:c", "paddle_onednn", "GPU", 1)):
        changed = [*key[:place], other, *key[place + 1 :]]
        assert float_evaluation.cached_evaluation(*changed, lambda: made(0.25))[0].map == 0.25


def test_a_damaged_cache_is_made_anew_and_it_does_not_grow(cache: Path) -> None:
    for number in range(float_evaluation.KEPT + 3):
        float_evaluation.cached_evaluation(str(number), "", "paddle", "CPU", 2, made)
    files = list(cache.glob("*.npz"))
    assert len(files) == float_evaluation.KEPT
    for file in files:
        file.write_bytes(file.read_bytes()[:-30])
    assert not any(
        float_evaluation.cached_evaluation(str(number), "", "paddle", "CPU", 2, made)[1]
        for number in range(float_evaluation.KEPT)
    )


def test_a_cache_that_cannot_be_written_is_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "file"))
    assert float_evaluation.cached_evaluation("", "", "paddle", "CPU", 2, made)[1] is False


def test_a_changed_model_or_annotation_is_evaluated_anew(demo, tmp_path: Path, cache: Path, monkeypatch) -> None:
    counted = []
    monkeypatch.setattr(Judge, "evaluate", lambda *args, **options: counted.append(args) or made())
    model, reader = demo.fp32, demo.reader()
    assert [REFERENCE.evaluate_float(model, reader, False)[1] for _ in range(2)] == [False, True]
    other = InferenceModel(tmp_path)
    other.model_path.write_bytes(model.model_path.read_bytes())
    raw = bytearray(model.params_path.read_bytes())
    raw[-1] ^= 1
    other.params_path.write_bytes(raw)
    assert not REFERENCE.evaluate_float(other, reader, False)[1]
    content = json.loads(reader.annotation_file("eval").read_text())
    content["annotations"][0]["bbox"][2] += 1
    (tmp_path / "eval.json").write_text(json.dumps(content))
    changed = demo.reader(f"EvalDataset.anno_path={tmp_path / 'eval.json'}")
    assert not REFERENCE.evaluate_float(model, changed, False)[1]
    assert len(counted) == 3
