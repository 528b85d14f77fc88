"""OpenVINO and ONNX Runtime: outputs compared with Paddle's, rejected requests, and selection of an engine."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from inference_fixtures import GPU_MACHINE, OBJECT, SHARED, SIZE, TinyReader, make_tiny_data

from act_pipeline.cli.eval import parse_request
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import ENGINES, Engine, best_engine, create_engine, find_support, machine, support
from act_pipeline.engines.machine import optional_packages
from act_pipeline.engines.onnx_runtimes import openvino as openvino_engine
from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
from act_pipeline.engines.onnx_runtimes.openvino import OpenVINOEngine
from act_pipeline.inference import InferenceRequest, run_inference
from act_pipeline.inference.engine_selection import choose_engine
from act_pipeline.onnx_export import lowered_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

REPOSITORY = Path(__file__).resolve().parents[1]
ONNX_ENGINES = ("openvino", "onnxruntime")
CPU_MACHINE = dataclasses.replace(
    GPU_MACHINE,
    gpus=(),
    cuda=None,
    bf16=True,
    packages={"onnx": "1.23.2", "openvino": "2026.4.1", "onnxruntime": "1.31.1"},
)
BARE_MACHINE = dataclasses.replace(CPU_MACHINE, packages={})
ALL_GPU_MACHINE = dataclasses.replace(
    GPU_MACHINE, nvidia_gpus=("Test GPU",), packages={**CPU_MACHINE.packages, "onnxruntime-gpu": "1.31.1"}
)
needs_bccd = pytest.mark.skipif(
    not (SHARED / "models/bccd").is_dir() or not (SHARED / "models/bccd_int8_stock").is_dir(),
    reason="needs ../shared/models/bccd and bccd_int8_stock beside the repository",
)


def make_batch(count: int, size: int = SIZE) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "image": random.random((count, 3, size, size), np.float32),
        "im_shape": np.full((count, 2), size, np.float32),
        "scale_factor": np.float32([[size / (100 + index), size / 200] for index in range(count)]),
        "im_id": np.arange(count),
    }


def run_once(name: str, model, batch, precision: str = "fp32", **options) -> dict[str, np.ndarray]:
    engine = create_engine(name, model, precision, threads=1, **options)
    try:
        return engine.run(batch)
    finally:
        engine.close()


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_float_model_gives_what_paddle_gives_in_batches_of_any_size(float_model, name):
    engine = create_engine(name, float_model, threads=1, batch_size=5)
    assert isinstance(engine, Engine)
    assert (engine.name, engine.precision, engine.device, engine.threads) == (name, "fp32", "CPU", 1)
    for count in (1, 3, 5, 2, 3):
        batch = make_batch(count)
        outputs, expected = engine.run(batch), run_once("paddle", float_model, batch)
        assert outputs["bbox"].dtype == np.float32 and outputs["bbox_num"].dtype == np.int32
        assert outputs["bbox_num"].tolist() == [2] * count
        np.testing.assert_allclose(outputs["bbox"], expected["bbox"], atol=1e-3)
    engine.close()
    engine.close()


_OVERLAPPING = """
import gc, signal, sys
import act_pipeline
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines import create_engine

signal.signal(signal.SIGALRM, lambda number, frame: print("handled"))
first, second = (create_engine("openvino", InferenceModel.load(sys.argv[1]), threads=1) for _ in range(2))
first.close()
del first
gc.collect()
second.close()
del second
gc.collect()
signal.raise_signal(signal.SIGALRM)
"""


def test_a_signal_after_engines_were_closed_does_not_end_the_process(float_model):
    """Seen on CPUs with AMX only: the signal stack that OpenVINO gives a thread must outlive its engines."""
    command = [sys.executable, "-c", _OVERLAPPING, str(float_model.directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("handled\n"), done.stderr[-2000:]


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_results_are_not_overwritten_by_the_next_run(float_model, name):
    engine = create_engine(name, float_model, threads=1)
    first = engine.run(make_batch(1))["bbox"]
    kept = first.copy()
    other = make_batch(1)
    other["scale_factor"] *= 2
    engine.run(other)
    engine.close()
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_int8_rounds_as_the_model_says(float_model, int8_model, name):
    batch = make_batch(2)
    batch["image"][:] = 1.435 / 127  # rounded to 1 / 127
    native = run_once("paddle", int8_model, batch, "int8")["bbox"]
    options = {"float_precision": "f32"} if name == "openvino" else {}
    found = run_once(name, int8_model, batch, "int8", batch_size=2, **options)["bbox"]
    np.testing.assert_allclose(found, native, atol=1e-3)
    assert np.abs(native - run_once("paddle", float_model, batch)["bbox"]).max() > 2e-3


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_the_artifact_is_the_file_that_was_loaded_and_a_file_can_be_given(float_model, name):
    engine = create_engine(name, float_model, threads=1)
    assert engine.artifact == lowered_onnx(float_model)
    assert engine.versions()[name].split("-")[0] == optional_packages()[name]
    engine.close()
    given = create_engine(name, engine.artifact, threads=1)
    assert given.artifact == engine.artifact
    batch = make_batch(1)
    expected = [[share * side for share, side in zip(OBJECT, (200, 100, 200, 100))]]
    np.testing.assert_allclose(given.run(batch)["bbox"][:1, 2:], expected, rtol=1e-4)
    given.close()


def test_bf16_is_openvinos(float_model):
    if not machine().bf16:
        pytest.skip("this CPU has no bf16")
    batch = make_batch(2)
    batch["image"] *= 0.1  # far from the flat part of the sigmoid
    engine = create_engine("openvino", float_model, "bf16", threads=1, batch_size=2)
    assert engine.settings == {"float_precision": "bf16", "batch": "fixed"} and engine.precision == "bf16"
    found, exact = engine.run(batch)["bbox"][:, 1], run_once("openvino", float_model, batch, batch_size=2)["bbox"][:, 1]
    engine.close()
    assert 0 < np.abs(found - exact).max() < 0.02  # f32 gives identical results twice
    with pytest.raises(UserError, match="onnxruntime has no bf16 on CPU.*--engine=openvino"):
        create_engine("onnxruntime", float_model, "bf16")


def test_what_is_not_int8_computes_in_f32_unless_bf16_is_asked_for(int8_model):
    engine = create_engine("openvino", int8_model, "int8", threads=1)
    assert engine.settings["float_precision"] == "f32"
    engine.close()
    with pytest.raises(UserError, match="float_precision is 'f16', expected one of auto, f32, bf16"):
        create_engine("openvino", int8_model, "int8", float_precision="f16")


@pytest.mark.parametrize("supported", [True, False])
def test_a_model_may_state_bf16_for_what_is_not_int8(int8_model, supported, tmp_path, monkeypatch):
    """Only where the CPU computes in bf16; an exported file beside the description is treated like its folder."""
    monkeypatch.setattr(openvino_engine, "computes_in_bf16", lambda core: supported)
    folder = tmp_path / "model"
    shutil.copytree(int8_model.directory, folder)
    described = yaml.safe_load((folder / "infer_cfg.yml").read_text()) if (folder / "infer_cfg.yml").exists() else {}
    (folder / "infer_cfg.yml").write_text(yaml.safe_dump({**described, "float_precision": "bf16"}))
    model = InferenceModel.load(folder)
    for stating in (model, lowered_onnx(model)):
        engine = create_engine("openvino", stating, "int8", threads=1)
        assert engine.settings["float_precision"] == ("bf16" if supported else "f32")
        engine.close()
    engine = create_engine("openvino", model, "int8", threads=1, float_precision="f32")
    assert engine.settings["float_precision"] == "f32"
    engine.close()
    (folder / "infer_cfg.yml").write_text("float_precision: half\n")
    with pytest.raises(UserError, match="infer_cfg.yml: float_precision is 'half', expected f32 or bf16"):
        create_engine("openvino", model, "int8", threads=1)


def test_float_precision_cannot_contradict_the_precision(float_model):
    with pytest.raises(UserError, match="'bf16', which contradicts the precision fp32"):
        create_engine("openvino", float_model, "fp32", float_precision="bf16")


@needs_bccd
@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_real_float_model_detects_what_it_does_in_paddle(name, tmp_path):
    model = InferenceModel.load(shutil.copytree(SHARED / "models/bccd", tmp_path / "model"))
    batch = make_batch(2, 256)
    expected = run_once("paddle", model, batch)
    found = run_once(name, model, batch, batch_size=2)
    assert found["bbox_num"].tolist() == expected["bbox_num"].tolist()
    for which in range(2):
        # Boxes are ordered by score; those within 1e-6 may swap, so only the best of each image are compared.
        first = which * int(expected["bbox_num"][0])
        rows = slice(first, first + 20)
        assert len(expected["bbox"][rows]) == 20
        np.testing.assert_allclose(found["bbox"][rows, 1], expected["bbox"][rows, 1], atol=1e-3)
        np.testing.assert_allclose(found["bbox"][rows, 2:], expected["bbox"][rows, 2:], atol=0.05)


@needs_bccd
def test_the_int8_model_of_stock_act_runs_in_both(tmp_path):
    model = InferenceModel.load(shutil.copytree(SHARED / "models/bccd_int8_stock", tmp_path / "model"))
    for name in ONNX_ENGINES:
        engine = create_engine(name, model, "int8", threads=1, batch_size=2)
        for count in (2, 1):
            outputs = engine.run(make_batch(count, 256))
            assert np.isfinite(outputs["bbox"]).all() and outputs["bbox_num"].tolist() == [80] * count
        engine.close()
        if name == "openvino":
            assert engine.settings["batch"] == "fixed"


def test_a_file_that_rounds_around_another_zero_keeps_its_range(int8_model, tmp_path):
    """The tiny model's image is rounded to uint8; with the zero point 100 its smallest value is -100 / 127."""
    proto = onnx.load(str(lowered_onnx(int8_model).path))
    (name,) = {node.input[2] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    zero_point = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    zero_point.CopyFrom(onnx.numpy_helper.from_array(np.array(100, np.uint8), name))
    onnx.save(proto, str(tmp_path / "asymmetric.onnx"))
    model = OnnxModel(tmp_path / "asymmetric.onnx")
    assert inspect_onnx(lowered_onnx(int8_model)).per_tensor and inspect_onnx(model).per_tensor
    batch = make_batch(1)
    batch["image"][:] = 0
    batch["image"][..., :8, :8] = 1.2  # outside the range of the zero point 128
    options = {"openvino": {"float_precision": "f32"}, "onnxruntime": {}}
    found, expected = (
        run_once(name, model, batch, "int8", **options[name])["bbox"][0, 1] for name in ("openvino", "onnxruntime")
    )
    clipped = run_once("onnxruntime", lowered_onnx(int8_model), batch, "int8")["bbox"][0, 1]
    assert abs(found - expected) < 1e-4 and abs(clipped - expected) > 0.01


def test_a_graph_that_openvino_refuses_with_a_fixed_batch_is_compiled_for_any(float_model, monkeypatch):
    def refuse(self, batch):
        raise RuntimeError("MatMulTransformation")

    monkeypatch.setattr(OpenVINOEngine, "_with_batch", refuse)
    engine = create_engine("openvino", float_model, threads=1, batch_size=3)
    for count in (3, 1):
        batch = make_batch(count)
        expected = run_once("paddle", float_model, batch)["bbox"]
        np.testing.assert_allclose(engine.run(batch)["bbox"], expected, atol=1e-3)
    engine.close()
    assert engine.settings["batch"] == "open"


# --- rejected requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_inputs_that_do_not_fit_are_one_line(float_model, name):
    engine = create_engine(name, float_model, threads=1, batch_size=2)
    whole = make_batch(2)
    lacking = {key: array for key, array in whole.items() if key != "scale_factor"}
    for batch, message in (
        (lacking, "takes an input 'scale_factor'"),
        (make_batch(1, 64), r"takes image \[N, 3, 32, 32\], the reader gives \[1, 3, 64, 64\].*--img_shape=32"),
        ({**whole, "im_shape": whole["im_shape"][:1]}, "inputs of one batch, .*im_shape of 1"),
        (make_batch(3), "was loaded for batches up to 2, this one has 3; .*--batch_size=3"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            engine.run(batch)
        assert "\n" not in str(caught.value)
    assert len(engine.run(whole)["bbox"]) == 4
    engine.close()


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_file_of_one_batch_size_takes_no_other(float_model, name):
    fixed = lowered_onnx(float_model, batch=2)
    engine = create_engine(name, fixed, threads=1, batch_size=2)
    assert len(engine.run(make_batch(2))["bbox"]) == 4
    with pytest.raises(UserError, match=r"the reader gives \[1, 2\]; set --batch_size=2, or write the file for any"):
        engine.run(make_batch(1))
    engine.close()


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_model_of_another_precision_is_refused(float_model, int8_model, name):
    for model in (int8_model, lowered_onnx(int8_model)):
        with pytest.raises(UserError, match="is an INT8 model, asked for fp32.*--precision=int8"):
            create_engine(name, model, "fp32")
    for model in (float_model, lowered_onnx(float_model)):
        with pytest.raises(UserError, match="holds no INT8 scales"):
            create_engine(name, model, "int8")


@pytest.mark.parametrize("recorded", [True, False])
def test_openvino_refuses_the_spelling_that_it_computes_wrong(int8_model, tmp_path, recorded):
    spelled = lowered_onnx(int8_model, "tensorrt")
    if not recorded:  # a file without the record of its export
        spelled = OnnxModel(Path(shutil.copy(spelled.path, tmp_path / "model.onnx")))
    with pytest.raises(UserError, match="int8 activations, zero point 0.*loses 0.05 mAP; .*--target cpu"):
        create_engine("openvino", spelled, "int8")
    create_engine("onnxruntime", spelled, "int8", threads=1).close()  # an engine that computes both correctly


def test_fp16_weights_are_not_run_as_fp32(float_model, tmp_path):
    proto = onnx.load(str(lowered_onnx(float_model).path))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float16), "half"))
    onnx.save(proto, str(tmp_path / "half.onnx"))
    for name in ONNX_ENGINES:
        with pytest.raises(UserError, match="holds FP16 weights, asked for FP32; write it without --float16"):
            create_engine(name, OnnxModel(tmp_path / "half.onnx"), "fp32")


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_damaged_file_is_one_line(float_model, tmp_path, name):
    raw = lowered_onnx(float_model).path.read_bytes()
    for index, content in enumerate((raw[: len(raw) // 2], b"no graph at all\n" * 9, b"\x08\x08")):
        path = tmp_path / f"{index}.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match="is truncated or no ONNX file") as caught:
            create_engine(name, OnnxModel(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_what_the_runtime_refuses_is_one_line(float_model, tmp_path, name):
    proto = onnx.load(str(lowered_onnx(float_model).path))
    proto.graph.node[0].op_type = "NoSuchOp"
    onnx.save(proto, str(tmp_path / "odd.onnx"))
    with pytest.raises(UserError, match="cannot (load|compile) .*odd.onnx.*") as caught:
        create_engine(name, OnnxModel(tmp_path / "odd.onnx"), threads=1)
    assert "\n" not in str(caught.value) and "NoSuchOp" in str(caught.value)


def test_paddle_takes_no_onnx_file(float_model):
    for name in ("paddle", "paddle_onednn"):
        with pytest.raises(UserError, match=f"is an ONNX file, {name} takes a model folder; .*openvino"):
            create_engine(name, lowered_onnx(float_model))


def test_names_and_devices_that_are_not_there(float_model):
    with pytest.raises(UserError, match="unknown engine 'openvin', expected one of .*did you mean 'openvino'"):
        create_engine("openvin", float_model)
    with pytest.raises(UserError, match="openvino runs on the CPU only; run with --device=CPU"):
        create_engine("openvino", float_model, device="GPU")
    with pytest.raises(UserError, match="provider is 'cuda', expected cpu on the CPU"):
        create_engine("onnxruntime", float_model, provider="cuda")
    with pytest.raises(UserError, match="has no CUDAExecutionProvider, only .*pip install onnxruntime-gpu"):
        create_engine("onnxruntime", float_model, device="GPU", machine=ALL_GPU_MACHINE)


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_missing_package_is_named_with_what_installs_it(float_model, name):
    entry = find_support(name, "fp32", "CPU", BARE_MACHINE)
    assert not entry.available and entry.why == f"{name} and onnx are not installed"
    with pytest.raises(UserError) as caught:
        create_engine(name, float_model, machine=BARE_MACHINE)
    assert f'pip install "act_pipeline[{name}]"' in str(caught.value)
    assert f"requirements/{name}.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ONNX_ENGINES)
def test_a_package_that_cannot_be_imported_is_named_too(float_model, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} cannot be imported .*act_pipeline\\[{name}\\]"):
        create_engine(name, float_model)


def test_without_paddle_a_file_runs_and_a_folder_does_not(float_model):
    here = dataclasses.replace(machine(), paddle=None, absent={"paddle": "No module named 'paddle'"})
    run_once("openvino", lowered_onnx(float_model), make_batch(1), machine=here)
    with pytest.raises(UserError, match="is a Paddle model, which cannot be read: No module named 'paddle'"):
        create_engine("openvino", float_model, machine=here)


# --- selection of an engine ------------------------------------------------------------------------------------------


def test_every_engine_has_rows():
    entries = support(CPU_MACHINE)
    assert {entry.engine for entry in entries} == set(ENGINES)
    for entry in entries:
        assert entry.why and bool(entry.remedy) != entry.available


@pytest.mark.parametrize(
    ("precision", "device", "here", "name", "why"),
    [
        ("int8", "CPU", CPU_MACHINE, "openvino", "the fastest for int8 on the CPU .OpenVINO 2026.4.1, INT8 kernels"),
        ("fp32", "CPU", CPU_MACHINE, "openvino", "the fastest for fp32 on the CPU"),
        ("bf16", "CPU", CPU_MACHINE, "openvino", "bf16 kernels"),
        ("int8", "CPU", BARE_MACHINE, "paddle_onednn", r"faster: openvino, but .*not installed; pip install"),
        ("fp32", "CPU", BARE_MACHINE, "paddle_onednn", r"faster: openvino, but .*not installed; pip install"),
    ],
)
def test_the_fastest_on_a_cpu(precision, device, here, name, why):
    found, said = best_engine(precision, device, here)
    assert found == name and re.search(why, said) and "\n" not in said


def test_onnx_runtime_comes_before_paddle():
    without = dataclasses.replace(CPU_MACHINE, packages={"onnx": "1.23.2", "onnxruntime": "1.31.1"})
    assert best_engine("fp32", "CPU", without)[0] == "onnxruntime"
    assert best_engine("int8", "CPU", without)[0] == "onnxruntime"
    assert best_engine("int8", "CPU", without, onnx_file=True)[0] == "onnxruntime"


def test_the_fastest_on_a_gpu_as_far_as_it_is_installed(monkeypatch):
    from act_pipeline.engines import registry

    monkeypatch.setattr(registry, "tensorrt_refusal", lambda here: None)
    monkeypatch.setattr(registry, "tensorrt_versions", lambda: "TensorRT 10")
    assert best_engine("int8", "GPU", ALL_GPU_MACHINE) == ("tensorrt", "the fastest for int8 on the GPU (TensorRT 10)")
    monkeypatch.setattr(registry, "tensorrt_refusal", lambda here: ("tensorrt is missing", "install it"))
    assert best_engine("int8", "GPU", ALL_GPU_MACHINE)[0] == "paddle_trt"
    without = dataclasses.replace(ALL_GPU_MACHINE, tensorrt_runtime=None)
    assert best_engine("fp16", "GPU", without)[0] == "onnxruntime"
    assert best_engine("fp16", "GPU", dataclasses.replace(without, packages={}))[0] == "paddle"


def test_nothing_can_run_is_said_with_what_to_install():
    with pytest.raises(UserError, match="no engine has fp16 on the CPU; .*has it elsewhere"):
        best_engine("fp16", "CPU", CPU_MACHINE)
    with pytest.raises(UserError, match="nothing here can run bf16 on the CPU: openvino, but .*pip install"):
        best_engine("bf16", "CPU", BARE_MACHINE)
    with pytest.raises(UserError, match="openvino, but this CPU has no bf16 .*run it as fp32"):
        best_engine("bf16", "CPU", dataclasses.replace(CPU_MACHINE, bf16=False))
    with pytest.raises(UserError, match="unknown precision 'int9'.*did you mean 'int8'"):
        best_engine("int9", "CPU", CPU_MACHINE)


def chosen(model, here, *flags: str, quantized: bool = True):
    choice = choose_engine(parse_request(list(flags)), model, quantized, here)
    return choice.name, choice.precision, choice.device


def test_paddleslims_flags_mean_what_they_did(int8_model):
    cases = {
        (): ("paddle", "int8", "CPU"),
        ("--use_mkldnn=True",): ("paddle_onednn", "int8", "CPU"),
        ("--use_trt=True",): ("paddle_trt", "int8", "GPU"),
        ("--use_trt=True", "--use_mkldnn=True"): ("paddle_trt", "int8", "GPU"),
        ("--engine=paddle_trt", "--use_trt=True"): ("paddle_trt", "int8", "GPU"),
        ("--engine=openvino",): ("openvino", "int8", "CPU"),
        ("--engine=onnxruntime",): ("onnxruntime", "int8", "CPU"),
        ("--engine=tensorrt",): ("tensorrt", "int8", "GPU"),
        ("--engine=auto",): ("openvino", "int8", "CPU"),
        ("--collect_shape_only=True", "--use_trt=True"): ("paddle", "int8", "CPU"),
    }
    for flags, expected in cases.items():
        assert chosen(int8_model, CPU_MACHINE, *flags) == expected, flags
    assert chosen(int8_model, GPU_MACHINE) == ("paddle", "int8", "GPU")
    assert chosen(int8_model, ALL_GPU_MACHINE, "--engine=onnxruntime") == ("onnxruntime", "int8", "GPU")
    assert chosen(int8_model, ALL_GPU_MACHINE, "--engine=auto", "--device=CPU") == ("openvino", "int8", "CPU")
    assert chosen(int8_model, ALL_GPU_MACHINE, "--engine=auto") == ("paddle_trt", "int8", "GPU")


def test_a_gpu_that_nothing_can_use_is_said_not_to_be_used(float_model):
    here = dataclasses.replace(CPU_MACHINE, nvidia_gpus=("Test GPU",))
    choice = choose_engine(InferenceRequest(engine="auto"), float_model, False, here)
    assert (choice.name, choice.device) == ("openvino", "CPU") and "; not on the GPU: nothing here" in choice.why


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--engine=openvino", "--use_trt=True"),
            "--engine=openvino contradicts --use_trt=True, which means paddle_trt",
        ),
        (("--engine=auto", "--use_trt=True"), "--engine=auto contradicts --use_trt=True"),
        (("--engine=paddle", "--use_mkldnn=True"), "contradicts --use_mkldnn=True, which means paddle_onednn"),
        (("--engine=openvino", "--collect_shape_only=True"), "collects what paddle_trt needs, --engine is openvino"),
    ],
)
def test_flags_that_contradict_each_other(int8_model, flags, message):
    with pytest.raises(UserError, match=message):
        chosen(int8_model, CPU_MACHINE, *flags)


# --- deploy/infer_eval.py --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def without_tensorrt(monkeypatch):
    """Machines here are test doubles, but whether TensorRT is installed is checked on this machine."""
    from act_pipeline.engines import registry

    monkeypatch.setattr(registry, "tensorrt_refusal", lambda here: ("tensorrt is not installed", "install it"))


@pytest.fixture()
def reader(tmp_path) -> TinyReader:
    annotations = make_tiny_data(tmp_path / "data", images=3)
    return TinyReader(annotations, annotations.parent / "images")


def request_for(path, **more) -> InferenceRequest:
    return InferenceRequest(model_path=str(path), device="CPU", cpu_threads=1, **more)


def test_auto_says_which_and_why_and_the_record_holds_what_was_loaded(int8_model, reader, tmp_path):
    said = []
    request = request_for(int8_model.directory, engine="auto", batch_size=2)
    outcome = run_inference(request, reader=reader, say=said.append)
    assert said[0].startswith("--engine=auto takes openvino: the fastest for int8 on the CPU (OpenVINO")
    lowered = lowered_onnx(int8_model)
    record = outcome.record
    assert (record["engine"], record["precision"], record["map"]) == ("openvino", "int8", 1.0)
    assert record["model_bytes"] == lowered.bytes and record["model_hash"] == lowered.content_hash()
    assert record["model"] == str(int8_model.directory) and record["artifact"] == str(lowered.path)
    assert record["engine_settings"]["float_precision"] in ("bf16", "f32")


def test_a_file_is_run_by_the_fastest_too_and_names_classes_from_its_folder(int8_model, reader, tmp_path):
    folder = shutil.copytree(int8_model.directory, tmp_path / "model")
    path = lowered_onnx(InferenceModel.load(folder)).path
    (folder / "infer_cfg.yml").write_text("label_list: [ring, box]\n", encoding="utf-8")
    said = []
    outcome = run_inference(request_for(path, benchmark=True), reader=reader, say=said.append)
    assert said[0].startswith("--engine=auto takes openvino") and outcome.record["model"] == str(path)

    class Elsewhere:
        path, input_size, preprocess = reader.path, reader.input_size, reader.preprocess

        @property
        def class_names(self):
            raise UserError("annotation file is missing")

    picture = str(tmp_path / "data/images/0.png")
    request = request_for(path, engine="onnxruntime", image_file=picture, output_dir=str(tmp_path / "out"))
    assert run_inference(request, reader=Elsewhere(), say=said.append).lines[0].startswith("ring 0.8")
    with pytest.raises(UserError, match="is an ONNX file, paddle takes a model folder"):
        run_inference(request_for(path, engine="paddle"), reader=reader, say=said.append)
    with pytest.raises(UserError, match="is an ONNX file, expected a model folder to collect shapes of"):
        run_inference(request_for(path, collect_shape_only=True), reader=reader, say=said.append)


# --- imports, and written files --------------------------------------------------------------------------------------


def run_python(code: str, home: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_asking_what_can_run_imports_no_runtime(tmp_path):
    code = (
        "import sys, act_pipeline.engines as e; first = set(sys.modules); e.support(); e.best_engine('int8'); "
        "found = ('paddle', 'openvino', 'onnxruntime', 'onnx', 'tensorrt', 'tensorrt_rtx'); "
        "print([m for m in found if m in first], [m for m in found[1:] if m in sys.modules])"
    )
    assert run_python(code, tmp_path) == "[] []"


def test_the_runtimes_report_nothing_and_leave_nothing_in_the_home_folder(float_model, tmp_path):
    path = lowered_onnx(float_model).path
    code = (
        "import sys, numpy as np; from act_pipeline.engines import create_engine; "
        f"from act_pipeline.core.artifacts import OnnxModel; model = OnnxModel.load({str(path)!r}); ones = "
        "np.ones((1, 2)); "
        f"batch = dict(image=np.zeros((1, 3, {SIZE}, {SIZE})), im_shape=ones, scale_factor=ones)\n"
        "for name in ('openvino', 'onnxruntime'): create_engine(name, model, threads=1).run(batch)\n"
        "print('openvino_telemetry' in sys.modules)"
    )
    before = sorted(path.parent.iterdir())
    assert run_python(code, tmp_path) == "False"
    left = {str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*") if entry.is_file()}
    assert not {entry for entry in left if "paddle" not in entry.lower()}, left
    assert sorted(path.parent.iterdir()) == before
