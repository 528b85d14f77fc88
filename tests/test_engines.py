"""The engines: inputs and outputs, rejected models, and their calls of Paddle."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import GPU_MACHINE, OBJECT, SHARED, SIZE, RecordingInference, export_tiny_model

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import Engine, create_engine, find_support, machine, support
from act_pipeline.engines.interface import runtime_error_line, without_pass_log
from act_pipeline.engines.paddle.dynamic_shape import RECORD_FILENAME, SHAPES_FILENAME, ShapeKey, collect, stale_reason
from act_pipeline.engines.paddle.native import PaddleEngine
from act_pipeline.graph.model_files import inspect_model

CPU_MACHINE = dataclasses.replace(
    GPU_MACHINE,
    gpus=(),
    cuda=None,
    cudnn=None,
    tensorrt_compiled=None,
    tensorrt_runtime=None,
    absent={"cuda": "paddlepaddle 2.6.2 is the CPU package"},
)


def copy_of(model: InferenceModel, directory: Path) -> InferenceModel:
    shutil.copytree(model.directory, directory)
    return InferenceModel.load(directory)


def make_batch(count: int, size: int = SIZE) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "image": random.random((count, 3, size, size), np.float32),
        "im_shape": np.full((count, 2), size, np.float32),
        "scale_factor": np.float32([[size / (100 + index), size / 200] for index in range(count)]),
        "im_id": np.arange(count),
    }


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paddle", "paddle_onednn"])
def test_boxes_are_in_pixels_of_each_original_image(float_model, name):
    engine = create_engine(name, float_model, threads=1)
    assert isinstance(engine, Engine)
    outputs = engine.run(make_batch(3))
    engine.close()
    assert outputs["bbox"].dtype == np.float32 and outputs["bbox_num"].dtype == np.int32
    assert outputs["bbox_num"].tolist() == [2, 2, 2]
    expected = [[share * side for share, side in zip(OBJECT, (200, 100 + i, 200, 100 + i))] for i in range(3)]
    np.testing.assert_allclose(outputs["bbox"][::2, 2:], expected, rtol=1e-4)


def test_the_batch_may_change_from_run_to_run(float_model):
    engine = create_engine("paddle", float_model, threads=1)
    whole = engine.run(make_batch(3))["bbox"]
    one = engine.run({name: array[2:] for name, array in make_batch(3).items()})["bbox"]
    np.testing.assert_allclose(one, whole[4:], rtol=1e-4)
    engine.close()


def test_closing_twice_is_no_error(float_model):
    engine = create_engine("paddle", float_model)
    engine.close()
    engine.close()


def test_int8_rounds_in_paddle_and_stays_near_float_in_both_engines(float_model, int8_model):
    batch = make_batch(2)
    scores = {}
    for name, model, precision in (
        ("paddle", float_model, "fp32"),
        ("paddle", int8_model, "int8"),
        ("paddle_onednn", int8_model, "int8"),
    ):
        engine = create_engine(name, model, precision, threads=1)
        assert (engine.name, engine.precision, engine.device, engine.threads) == (name, precision, "CPU", 1)
        scores[name, precision] = engine.run(batch)["bbox"][::2, 1]
        engine.close()
    native = scores["paddle", "int8"]
    assert 0 < np.abs(native - scores["paddle", "fp32"]).max() < 0.02
    np.testing.assert_allclose(scores["paddle_onednn", "int8"], native, atol=0.02)


def test_a_picture_of_the_wrong_size_is_refused_with_the_flag_that_mends_it(float_model):
    engine = create_engine("paddle", float_model, threads=1)
    with pytest.raises(
        UserError, match=r"takes image \[N, 3, 32, 32\], the reader gives \[1, 3, 64, 64\].*--img_shape=32"
    ):
        engine.run(make_batch(1, size=64))
    engine.close()


def test_a_missing_input_is_named(float_model):
    engine = create_engine("paddle", float_model, threads=1)
    batch = make_batch(1)
    del batch["scale_factor"]
    with pytest.raises(UserError, match="takes an input 'scale_factor'"):
        engine.run(batch)
    engine.close()


def test_paddle_prints_nothing_on_loading_int8_in_onednn(int8_model, capfd):
    create_engine("paddle_onednn", int8_model, "int8", threads=1).close()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "squashed" not in captured.err and "quantized" not in captured.err


def test_only_pass_statistics_are_dropped(capfd):
    with without_pass_log():
        os.write(2, b"\x1b[37m---    squashed 0 requantize ops\x1b[0m\nW1121 something is wrong\n")
    assert capfd.readouterr().err == "W1121 something is wrong\n"


def test_importing_the_package_imports_no_runtime():
    code = (
        "import sys, act_pipeline.engines, act_pipeline.evaluation, act_pipeline.inference, "
        "act_pipeline.cli.eval, "
        "act_pipeline.inference.visualize; print([m for m in ('paddle', 'matplotlib', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# --- damaged files ---------------------------------------------------------------------------------------------------


def damaged(model: InferenceModel, directory: Path, name: str, change) -> InferenceModel:
    copied = copy_of(model, directory)
    path = copied.directory / name
    path.write_bytes(change(path.read_bytes()))
    return copied


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", ["model.pdmodel", "model.pdiparams"])
def test_truncated_files_are_one_line(int8_model, tmp_path, name, share):
    model = damaged(int8_model, tmp_path / "m", name, lambda raw: raw[: int(len(raw) * share) if share > 0 else -1])
    with pytest.raises(UserError, match="truncated") as caught:
        create_engine("paddle", model, "int8")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_every_truncation_of_the_parameters_is_noticed(float_model, tmp_path):
    raw = float_model.params_path.read_bytes()
    for end in range(1, len(raw), 7):
        model = InferenceModel(tmp_path, "model.pdmodel", "model.pdiparams")
        model.model_path.write_bytes(float_model.model_path.read_bytes())
        model.params_path.write_bytes(raw[:end])
        with pytest.raises(UserError):
            inspect_model(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.pdmodel", lambda raw: b"no program at all\n" * 40, "truncated or no Paddle program"),
        ("model.pdiparams", lambda raw: b"no parameters at all\n" * 400, "is no Paddle parameters file"),
        ("model.pdiparams", lambda raw: raw + raw, "more than the"),
        ("model.pdiparams", lambda raw: raw + b"more", "no valid header|truncated"),
        ("model.pdiparams", lambda raw: b"\0" * 4 + b"\xff" * 8 + raw[12:], "no valid header"),
    ],
)
def test_files_of_another_kind_are_one_line(float_model, tmp_path, name, change, message):
    model = damaged(float_model, tmp_path / "m", name, change)
    with pytest.raises(UserError, match=message):
        create_engine("paddle", model)


def test_parameters_of_another_export_name_the_first_that_differs(float_model, int8_model, tmp_path):
    model = damaged(float_model, tmp_path / "m", "model.pdiparams", lambda raw: int8_model.params_path.read_bytes())
    with pytest.raises(UserError, match=r"not of the same export.*is \[1\], expected \[8, 3, 3, 3\]"):
        create_engine("paddle", model)


def test_the_summary_of_a_model(int8_model, float_model):
    summary = inspect_model(int8_model)
    assert list(summary.inputs) == ["im_shape", "image", "scale_factor"]
    assert summary.inputs["image"] == (-1, 3, SIZE, SIZE) and summary.input_size == (SIZE, SIZE)
    assert len(summary.outputs) == 2 and summary.quantized and summary.op_counts["conv2d"] == 1
    assert not inspect_model(float_model).quantized


def test_onednn_does_not_get_quantized_weights_that_it_would_misread(tmp_path):
    model = export_tiny_model(tmp_path / "m", quantized=True, stored_type=np.float32)
    assert inspect_model(model).float_stored_weights == ("w",)
    create_engine("paddle", model, "int8").close()
    with pytest.raises(
        UserError, match=r"holds 1 quantized weights in another type than int8 \(w, .*--use_mkldnn=False"
    ):
        create_engine("paddle_onednn", model, "int8")


# --- what this machine supports --------------------------------------------------------------------------------------


def test_a_precision_that_is_not_the_models_is_refused(float_model, int8_model):
    with pytest.raises(UserError, match="holds no INT8 scales.*tools/compress.py"):
        create_engine("paddle", float_model, "int8")
    with pytest.raises(UserError, match="is an INT8 model, asked for fp32"):
        create_engine("paddle", int8_model, "fp32")


def test_unknown_names_are_told_the_near_one(float_model):
    with pytest.raises(UserError, match="did you mean 'paddle_trt'"):
        create_engine("paddle_tr", float_model)
    with pytest.raises(UserError, match="paddle has no fp16 on CPU; it has fp32 on CPU"):
        create_engine("paddle", float_model, "fp16")


def test_this_machine_can_do_what_support_says(float_model, int8_model, tmp_path):
    float_model, int8_model = copy_of(float_model, tmp_path / "fp32"), copy_of(int8_model, tmp_path / "int8")
    entries = support()
    assert {(e.engine, e.precision, e.device) for e in entries} >= {
        ("paddle", "fp32", "CPU"),
        ("paddle_onednn", "int8", "CPU"),
        ("paddle", "fp32", "GPU"),
        ("paddle_trt", "int8", "GPU"),
        ("openvino", "bf16", "CPU"),
        ("onnxruntime", "fp32", "CPU"),
        ("tensorrt", "int8", "GPU"),
    }
    for entry in entries:
        assert entry.why and bool(entry.remedy) != entry.available
        if entry.available and entry.device == "CPU":
            model = int8_model if entry.precision == "int8" else float_model
            create_engine(entry.engine, model, entry.precision, "CPU", threads=1).close()


def test_the_machine_gives_a_reason_for_all_that_is_absent():
    here = machine()
    assert here.cpu and here.cores >= 1 and here.paddle
    for name in ("gpus", "nvidia_gpus", "cuda", "cudnn", "tensorrt_compiled", "tensorrt_runtime"):
        assert getattr(here, name) or here.absent[name]


@pytest.mark.parametrize(
    ("changes", "why", "remedy"),
    [
        (
            {"cuda": None, "absent": {"cuda": "the CPU package"}},
            "the CPU package",
            "requirements/gpu.txt.*--device=CPU",
        ),
        ({"gpus": ()}, "no NVIDIA GPU", "nvidia-smi"),
        ({"tensorrt_compiled": None}, "built without TensorRT", "--use_trt=False"),
        (
            {"tensorrt_runtime": None, "absent": {"tensorrt_runtime": "(NotFound) no libnvinfer.so"}},
            r"TensorRT is missing \(\(NotFound\) no libnvinfer.so\)",
            r"install TensorRT 8\.5\.3.*libnvinfer\.so\.8",
        ),
        (
            {"tensorrt_runtime": (10, 0, 1)},
            r"TensorRT 10\.0\.1 was found, Paddle was built with 8\.5\.3",
            r"TensorRT 8\.x",
        ),
    ],
)
def test_what_tensorrt_misses_is_said(float_model, changes, why, remedy):
    here = dataclasses.replace(GPU_MACHINE, **changes)
    entry = find_support("paddle_trt", "fp16", "GPU", here)
    assert not entry.available
    assert re.search(why, entry.why) and re.search(remedy, entry.remedy)
    with pytest.raises(UserError, match=why):
        create_engine("paddle_trt", float_model, "fp16", "GPU", machine=here)


def test_tensorrt_of_the_same_major_version_is_taken():
    here = dataclasses.replace(GPU_MACHINE, tensorrt_runtime=(8, 6, 1))
    entry = find_support("paddle_trt", "int8", "GPU", here)
    assert entry.available and entry.why == "TensorRT 8.6.1, built with 8.5.3"


def test_without_paddle_nothing_runs_and_the_reason_is_said():
    here = dataclasses.replace(CPU_MACHINE, paddle=None, absent={"paddle": "No module named 'paddle'"})
    paddles = [entry for entry in support(here) if entry.engine.startswith("paddle")]
    assert paddles and all(not entry.available and "No module" in entry.why for entry in paddles)


def test_runtime_errors_are_their_sentence():
    text = (
        "\n\n--------------\nC++ Traceback (most recent call last):\n----\nNot support stack backtrace yet.\n\n----\n"
        "Error Message Summary:\n----\nInvalidArgumentError: nothing\n"
        "(InvalidArgument) Failed to parse\n program_desc.\n  [Hint: Expected a == true.] (at /paddle/desc.cc:152)\n"
    )
    assert runtime_error_line(ValueError(text)) == "(InvalidArgument) Failed to parse program_desc."
    assert runtime_error_line(RuntimeError("could not create a primitive")) == "could not create a primitive"
    assert runtime_error_line(KeyError()) == "KeyError"


# --- calls of Paddle -------------------------------------------------------------------------------------------------


def test_calls_for_onednn_int8(int8_model):
    paddle = RecordingInference()
    PaddleEngine(int8_model, "int8", "CPU", 3, onednn=True, inference=paddle)
    assert paddle.find("set_cpu_math_library_num_threads")[0].args == (3,)
    assert paddle.find("enable_mkldnn_int8")[0].args == ({"conv2d", "depthwise_conv2d"},)
    assert paddle.find("disable_gpu") and not paddle.find("enable_use_gpu")
    assert paddle.calls[-1].name == "create_predictor"


def test_calls_for_the_gpu(float_model):
    paddle = RecordingInference()
    create_engine("paddle", float_model, "fp16", "GPU", machine=GPU_MACHINE, inference=paddle)
    assert paddle.find("enable_use_gpu")[0].args == (1000, 0, "Half")
    assert not paddle.find("enable_mkldnn") and not paddle.find("disable_gpu")


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "Float32"), ("fp16", "Half"), ("int8", "Int8")])
def test_calls_for_tensorrt(float_model, int8_model, tmp_path, precision, mode):
    model = copy_of(int8_model if precision == "int8" else float_model, tmp_path / "m")
    (model.directory / SHAPES_FILENAME).write_text("shapes", encoding="utf-8")
    paddle = RecordingInference()
    engine = create_engine("paddle_trt", model, precision, "GPU", machine=GPU_MACHINE, inference=paddle, batch_size=4)
    assert paddle.find("enable_tensorrt_engine")[0].kwargs == {
        "workspace_size": 4 << 30,
        "max_batch_size": 4,
        "min_subgraph_size": 3,
        "precision_mode": mode,
        "use_static": True,
        "use_calib_mode": False,
    }
    assert paddle.find("enable_tuned_tensorrt_dynamic_shape")[0].args == (str(model.directory / SHAPES_FILENAME), True)
    cache = Path(paddle.find("set_optim_cache_dir")[0].args[0])
    assert cache.is_dir() and cache.parent == model.directory / "trt_cache"
    assert engine.versions()["tensorrt"] == "8.5.3" and engine.versions()["cuda"] == "11.8"
    assert engine.run(make_batch(4))["bbox_num"].tolist() == [1, 1, 1, 1]


def test_the_engine_cache_is_another_for_all_that_decides_the_engine(float_model, tmp_path):
    def cache(model: InferenceModel, here=GPU_MACHINE, precision="fp32", **options) -> str:
        paddle = RecordingInference()
        create_engine("paddle_trt", model, precision, "GPU", machine=here, inference=paddle, **options)
        return Path(paddle.find("set_optim_cache_dir")[0].args[0]).name

    model = copy_of(float_model, tmp_path / "m")
    shapes = model.directory / SHAPES_FILENAME
    shapes.write_text("shapes", encoding="utf-8")
    first = cache(model)
    assert cache(model) == first
    others = {
        cache(model, precision="fp16"),
        cache(model, batch_size=2),
        cache(model, dataclasses.replace(GPU_MACHINE, gpus=("Other GPU",))),
        cache(model, dataclasses.replace(GPU_MACHINE, tensorrt_runtime=(8, 6, 1))),
        cache(model, dynamic_shape=False),
    }
    shapes.write_text("other shapes", encoding="utf-8")
    others.add(cache(model))
    raw = bytearray(model.params_path.read_bytes())
    raw[-1] ^= 1  # other weights in the same graph, for which Paddle generates the same engine name
    model.params_path.write_bytes(bytes(raw))
    others.add(cache(model))
    assert first not in others and len(others) == 7


def test_static_shapes_for_tensorrt_need_no_collecting(float_model, tmp_path):
    model = copy_of(float_model, tmp_path / "m")
    paddle = RecordingInference()
    create_engine("paddle_trt", model, "fp32", "GPU", machine=GPU_MACHINE, inference=paddle, dynamic_shape=False)
    assert not paddle.find("enable_tuned_tensorrt_dynamic_shape")
    with pytest.raises(UserError, match="dynamic_shape.txt is missing; collect it first"):
        create_engine("paddle_trt", model, "fp32", "GPU", machine=GPU_MACHINE, inference=paddle)


def test_what_paddle_refuses_is_one_line(float_model):
    paddle = RecordingInference(
        RuntimeError("(PreconditionNotMet) To use Paddle-TensorRT, compile.\n  [Hint: x] (at a.cc:1)")
    )
    with pytest.raises(UserError, match=r"cannot load .*: \(PreconditionNotMet\) To use Paddle-TensorRT, compile\.$"):
        PaddleEngine(float_model, inference=paddle)


# --- collecting shapes -----------------------------------------------------------------------------------------------


def key_of(model: InferenceModel, size: int = SIZE, batch_size: int = 2) -> ShapeKey:
    return ShapeKey(model.content_hash(), (size, size), batch_size, "2.6.2")


def collected(model: InferenceModel, directory: Path) -> InferenceModel:
    model = copy_of(model, directory)
    collect(model, key_of(model), [make_batch(1), make_batch(2)], threads=1)
    return model


def test_shapes_are_really_collected_on_the_cpu(int8_model, tmp_path):
    model = collected(int8_model, tmp_path / "m")
    text = (model.directory / SHAPES_FILENAME).read_text(encoding="utf-8")
    entry = next(part for part in text.split("shape_range_info") if '"image"' in part)
    assert re.findall(r"min_shape: (\d+)", entry) == ["1", "3", str(SIZE), str(SIZE)]
    assert re.findall(r"max_shape: (\d+)", entry) == ["2", "3", str(SIZE), str(SIZE)]
    assert text.count("shape_range_info") > 10
    record = json.loads((model.directory / RECORD_FILENAME).read_text(encoding="utf-8"))
    assert record["schema"] == "act_pipeline.dynamic_shape/1"
    assert record["model_hash"] == model.content_hash() and record["input_size"] == [SIZE, SIZE]
    assert sorted(path.name for path in model.directory.iterdir()) == sorted(
        [*(path.name for path in int8_model.directory.iterdir()), SHAPES_FILENAME, RECORD_FILENAME]
    )
    assert stale_reason(model, key_of(model)) is None
    assert stale_reason(model, key_of(model, batch_size=1)) is None


def test_why_shapes_are_collected_anew(float_model, int8_model, tmp_path):
    model = collected(float_model, tmp_path / "m")
    assert "not there yet" in stale_reason(float_model, key_of(float_model))
    assert "another model" in stale_reason(model, key_of(int8_model))
    assert "was collected at 32 x 32, the input is 64 x 64" in stale_reason(model, key_of(model, size=64))
    assert "batches up to 2, asked for 8" in stale_reason(model, key_of(model, batch_size=8))
    assert "by Paddle '2.6.2', this is '3.0'" in stale_reason(model, dataclasses.replace(key_of(model), paddle="3.0"))
    shapes, record = model.directory / SHAPES_FILENAME, model.directory / RECORD_FILENAME
    content = record.read_text(encoding="utf-8")
    for broken in ("", "[]", "{", content.replace("dynamic_shape/1", "dynamic_shape/9"), '{"schema": 1}'):
        record.write_text(broken, encoding="utf-8")
        assert "damaged" in stale_reason(model, key_of(model))
    record.write_text(content, encoding="utf-8")
    shapes.write_text("of PaddleSlim's own script", encoding="utf-8")
    assert "changed after it was collected" in stale_reason(model, key_of(model))
    record.unlink()
    assert f"has no {RECORD_FILENAME}" in stale_reason(model, key_of(model))


class SilentInference(RecordingInference):
    """Paddle when it cannot write its file: neither an error nor a file."""

    def create_predictor(self, config):
        config.shapes = None
        return super().create_predictor(config)


def test_a_failed_collection_leaves_what_was_there(float_model, tmp_path):
    model = collected(float_model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in model.directory.iterdir()}
    with pytest.raises(UserError, match="collected no shapes"):
        collect(model, key_of(model), [make_batch(1)], inference=SilentInference())

    def interrupted():
        yield make_batch(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, key_of(model), interrupted(), threads=1)
    assert {path.name: path.read_bytes() for path in model.directory.iterdir()} == before


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "models/bccd").exists(), reason="needs ../shared/models/bccd beside the repository")
def test_graph_optimizations_do_not_change_a_real_model():
    model = InferenceModel.load(SHARED / "models/bccd")
    batch = make_batch(1, size=256)
    found = []
    for name in ("paddle", "paddle_onednn"):
        engine = create_engine(name, model, threads=1)
        found.append(engine.run(batch)["bbox"])
        engine.close()
    from paddle import inference

    config = inference.Config(str(model.model_path), str(model.params_path))
    config.disable_glog_info()
    config.switch_ir_optim(False)
    plain = inference.create_predictor(config)
    for name in plain.get_input_names():
        plain.get_input_handle(name).copy_from_cpu(batch[name])
    plain.run()
    expected = plain.get_output_handle(plain.get_output_names()[0]).copy_to_cpu()
    for bbox in found:
        np.testing.assert_allclose(bbox[:20], expected[:20], atol=1e-2, rtol=1e-3)


@pytest.mark.skipif(
    not (SHARED / "models/bccd_int8_stock").exists(),
    reason="needs ../shared/models/bccd_int8_stock beside the repository",
)
def test_the_int8_model_that_stock_act_writes_runs_in_onednn():
    model = InferenceModel.load(SHARED / "models/bccd_int8_stock")
    engine = create_engine("paddle_onednn", model, "int8", threads=1)
    outputs = engine.run(make_batch(1, size=256))
    engine.close()
    assert np.isfinite(outputs["bbox"]).all() and outputs["bbox_num"].tolist() == [len(outputs["bbox"])]
