"""TensorRT: which of our files NVIDIA's parser and builder accept; with test doubles, the calls and the cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import GPU_MACHINE, OBJECT, SHARED, SIZE
from tensorrt_fixtures import FakeCudaRuntime, export_biased_model, fake_cuda, fake_tensorrt

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.engines.tensorrt import cudart, module
from act_pipeline.engines.tensorrt.build import BuildOptions
from act_pipeline.engines.tensorrt.cudart import Cuda, CudaError, Gpu
from act_pipeline.engines.tensorrt.engine import TensorRTEngine, tensorrt_refusal, tensorrt_versions
from act_pipeline.engines.tensorrt.plan import build_plan
from act_pipeline.onnx_export import lowered_onnx

pytest.importorskip("onnx")
REPOSITORY = Path(__file__).resolve().parents[1]
PADDLE2ONNX = Path(__file__).parent / "data" / "paddle2onnx" / "int8_conv.onnx"
GPU = Gpu("Test GPU", (8, 6))
FLOAT32_REST = BuildOptions(float16_rest=False)


@pytest.fixture(scope="module")
def rtx():
    """NVIDIA's real parser and builder."""
    if not any(flavour.name == "tensorrt_rtx" for flavour in module.installed()):
        pytest.skip("tensorrt_rtx is not installed (requirements/tensorrt-rtx.txt)")
    return module.import_tensorrt(["tensorrt_rtx"])


@pytest.fixture
def model(int8_model, tmp_path) -> InferenceModel:
    """The tiny INT8 model in a folder per test, so that its cache is empty."""
    shutil.copytree(int8_model.directory, tmp_path / "model", ignore=shutil.ignore_patterns("trt_cache"))
    return InferenceModel.load(tmp_path / "model")


def batch(count: int) -> dict[str, np.ndarray]:
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    return {
        "image": np.broadcast_to(scores[:, None, None, None], (count, 3, SIZE, SIZE)).copy(),
        "im_shape": np.full((count, 2), SIZE, np.float32),
        "scale_factor": np.full((count, 2), 0.5, np.float32),
    }


def quiet(line: str) -> None:
    pass


# NVIDIA's real parser and builder.


def test_rtx_builds_our_file_and_refuses_paddle2onnx_one_of_the_same_model(rtx, tmp_path, monkeypatch) -> None:
    model = export_biased_model(tmp_path / "model", monkeypatch)
    record = build_plan(model, tmp_path / "ours.plan", "int8", 4, say=quiet, options=FLOAT32_REST, trt=rtx)
    assert record.int8_layers == {"convolution": 1} and record.layers["convolution"] == 1
    assert record.bytes == (tmp_path / "ours.plan").stat().st_size > record.onnx_bytes
    with pytest.raises(UserError) as refused:
        build_plan(
            OnnxModel.load(PADDLE2ONNX), tmp_path / "theirs.plan", "int8", 1, say=quiet, options=FLOAT32_REST, trt=rtx
        )
    message = str(refused.value)
    assert "(DequantizeLinear)" in message and "Int32" in message and "--target tensorrt" in message
    assert "cudaError" not in message, "that there is no driver is not the reason"
    assert "\n" not in message and not (tmp_path / "theirs.plan").exists()


def test_rtx_builds_the_sample_in_int8_with_every_convolution_and_matmul(rtx, demo, tmp_path) -> None:
    model = demo.compressed.model
    record = build_plan(model, tmp_path / "sample.plan", "int8", 8, say=quiet, options=FLOAT32_REST, trt=rtx)
    quantized = lowered_onnx(model, "tensorrt").record()["quantized"]
    convolutions = sum(count for kind, count in quantized.items() if "conv2d" in kind)
    assert record.int8_layers == {"convolution": convolutions, "matmul": quantized["matmul_v2"]}
    assert record.layers["convolution"] == convolutions
    assert record.recipe.profile["image"] == [[1, 3, 224, 224], [8, 3, 224, 224], [8, 3, 224, 224]]
    assert record.recipe.built_for == "portable"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_the_float_sample(rtx, demo, tmp_path, precision) -> None:
    record = build_plan(demo.fp32, tmp_path / "sample.plan", precision, 1, say=quiet, trt=rtx)
    assert record.int8_layers == {} and record.layers["convolution"] > 0
    weights = demo.fp32.params_path.stat().st_size
    assert record.bytes > weights if precision == "fp32" else record.onnx_bytes < 0.55 * weights


@pytest.mark.slow
def test_rtx_builds_r18_in_int8_at_two_fifths_of_fp32(rtx, tmp_path) -> None:
    """Random weights; the rest of a plan is the source code of its kernels, about 130 kB each."""
    import paddle

    from act_pipeline.compress import compress
    from act_pipeline.config import load_config
    from act_pipeline.data.builtin_sample import make_sample
    from act_pipeline.export import export_model
    from act_pipeline.rtdetr import build_model

    classes, yaml = "num_classes=10", REPOSITORY / "configs/rtdetr/rtdetr_r18vd_6x_coco.yml"
    weights = build_model(yaml, [classes]).state_dict()
    random = np.random.default_rng(0)
    for name, value in weights.items():  # untrained decoder layers are copies, which a plan stores only once
        if not name.endswith(("_mean", "_variance")):
            array = value.numpy()
            value.set_value((array * random.normal(1, 0.1, array.shape)).astype(array.dtype))
    paddle.save(weights, str(tmp_path / "r18.pdparams"))
    make_sample(tmp_path / "data", train=4, val=2, progress=False)
    fp32 = export_model(yaml, tmp_path, [classes, f"weights={tmp_path / 'r18.pdparams'}"])
    reader = (REPOSITORY / "configs/readers/sample_reader.yml").read_text(encoding="utf-8")
    reader = reader.replace("dataset/sample", str(tmp_path / "data")).replace("224", "640")
    (tmp_path / "reader.yml").write_text(reader, encoding="utf-8")
    settings = {
        "Global.reader_config": tmp_path / "reader.yml",
        "Global.model_dir": fp32.directory,
        "Global.Evaluation": "false",
        "TrainConfig.train_iter": 2,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(REPOSITORY / "configs/act/rtdetr_r18vd_qat_dis.yaml", overrides)
    int8 = compress(config, tmp_path / "int8", progress=False).model
    whole, small = (
        build_plan(model, tmp_path / f"{precision}.plan", precision, 1, say=quiet, options=FLOAT32_REST, trt=rtx)
        for model, precision in ((fp32, "fp32"), (int8, "int8"))
    )
    assert small.int8_layers == {"convolution": 57, "matmul": 65}
    assert small.bytes <= 0.40 * whole.bytes
    assert max(whole.seconds, small.seconds) < 120


@pytest.mark.skipif(not (SHARED / "models/bccd_int8_stock").is_dir(), reason="the blood cell models are not at hand")
def test_rtx_builds_a_model_that_stock_act_wrote(rtx, tmp_path) -> None:
    model = InferenceModel.load(SHARED / "models/bccd_int8_stock")
    lowered = tmp_path / "stock.onnx"
    from act_pipeline.onnx_export import lower

    lower(model, lowered, "tensorrt")
    record = build_plan(
        OnnxModel.load(lowered), tmp_path / "stock.plan", "int8", 1, say=quiet, options=FLOAT32_REST, trt=rtx
    )
    assert record.int8_layers["convolution"] == record.layers["convolution"]


def test_rtx_names_the_compute_capabilities_that_it_builds_for(rtx, model, tmp_path) -> None:
    options = BuildOptions(float16_rest=False, compute_capability="8.9")
    assert (
        build_plan(model, tmp_path / "a.plan", "int8", 1, say=quiet, options=options, trt=rtx).recipe.built_for
        == "SM89"
    )
    with pytest.raises(UserError, match=r"--compute_capability is '9.0', TensorRT-RTX \S+ builds for 7.5, 8.0"):
        build_plan(model, tmp_path / "b.plan", trt=rtx, options=BuildOptions(compute_capability="9.0"), say=quiet)


def test_the_command_builds_and_says_what_it_cannot(rtx, model, tmp_path, capsys) -> None:
    from act_pipeline.cli import engine

    output = tmp_path / "tiny.plan"
    command = [sys.executable, "deploy/build_engine.py", "--model_path", str(model.directory), "--output", str(output)]
    ended = subprocess.run(
        [*command, "--batch_size", "2", "--float16_rest", "False"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"built {output}" in ended.stdout and "1 of 1 convolutions" in ended.stdout and "of 1 to 2" in ended.stdout
    assert json.loads(output.with_suffix(".json").read_text())["bytes"] == output.stat().st_size
    refused = [(["--precision", "fp32"], "is an INT8 model, asked for fp32")]
    if Cuda().gpu() is None:
        refused.append((["--layers"], "--layers needs an NVIDIA GPU"))
    for flags, words in refused:
        assert run_command(engine.main, ["--model_path", str(model.directory), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error


def test_cuda_bindings_has_what_is_called() -> None:
    if not cudart.has_cudart():
        pytest.skip("cuda-bindings is not installed (requirements/tensorrt-rtx.txt)")
    from cuda.bindings import runtime

    own = [name for name in vars(FakeCudaRuntime) if name.startswith("cuda")]
    called = ["cudaGetDevice", "cudaEventCreate", "cudaEventRecord", "cudaStreamSynchronize"]
    assert all(hasattr(runtime, name) for name in (*own, *called))
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyHostToDevice")


# Calls of TensorRT.


def plan_of(model, tmp_path, trt, precision="int8", batch_size=1, **options) -> dict:
    record = build_plan(
        model, tmp_path / "a.plan", precision, batch_size, say=quiet, options=BuildOptions(**options), trt=trt, gpu=GPU
    )
    return json.loads(record.path.read_bytes())


def test_the_profile_is_of_all_inputs_from_1_to_the_batch_size(model, tmp_path) -> None:
    told = plan_of(model, tmp_path, fake_tensorrt(), batch_size=8, float16_rest=False)
    assert told["profile"] == {
        "image": [[1, 3, SIZE, SIZE], [8, 3, SIZE, SIZE], [8, 3, SIZE, SIZE]],
        "im_shape": [[1, 2], [8, 2], [8, 2]],
        "scale_factor": [[1, 2], [8, 2], [8, 2]],
    }
    assert told["workspace"] == 4 << 30


@pytest.mark.parametrize(
    ("version", "float16_rest", "network_flags", "flags"),
    [
        ("8.6.1", False, 1, ["INT8"]),
        ("8.6.1", True, 1, ["INT8", "FP16"]),
        ("10.9.0", False, 2, []),
    ],
)
def test_flags_by_version(model, tmp_path, version, float16_rest, network_flags, flags) -> None:
    told = plan_of(model, tmp_path, fake_tensorrt(version), float16_rest=float16_rest)
    assert (told["network_flags"], told["flags"]) == (network_flags, flags)


def test_a_float_model_at_fp16(float_model, tmp_path) -> None:
    assert plan_of(float_model, tmp_path, fake_tensorrt("8.6.1"), "fp16")["flags"] == ["FP16"]
    assert plan_of(float_model, tmp_path, fake_tensorrt("8.6.1"), "fp32")["flags"] == []


def test_a_typed_network_is_given_a_file_of_fp16(model, float_model, tmp_path) -> None:
    """FP16 is set in the file, so that no builder can apply it to the post-processing."""
    for which, precision in ((model, "int8"), (float_model, "fp16")):
        record = build_plan(which, tmp_path / "a.plan", precision, 1, say=quiet, trt=fake_tensorrt(), gpu=GPU)
        assert record.onnx_path.name == "model_tensorrt_fp16.onnx"
        assert json.loads(record.path.read_bytes())["flags"] == []


def test_rtx_builds_for_turing_only_where_turing_is(model, tmp_path) -> None:
    trt = fake_tensorrt("1.7.1", "tensorrt_rtx")
    assert "capability" not in plan_of(model, tmp_path, trt, float16_rest=False)
    turing = Gpu("T4", (7, 5))
    record = build_plan(model, tmp_path / "b.plan", "int8", 1, say=quiet, options=FLOAT32_REST, trt=trt, gpu=turing)
    assert json.loads(record.path.read_bytes())["capability"] == "SM75"


def test_timings_are_kept_from_build_to_build(model, tmp_path) -> None:
    trt = fake_tensorrt()
    first, second = (
        plan_of(model, tmp_path, trt, float16_rest=False, workspace_bytes=size)["timings"] for size in (1, 2)
    )
    assert second > first


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ((7, "conv.3", "GridSample", "Unsupported\n mode"), r"node 'conv.3' \(GridSample\): Unsupported mode"),
        ((7, None, None, "Unsupported"), r"node number 7: Unsupported"),
    ],
)
def test_a_refusal_of_the_parser_names_the_node(model, tmp_path, error, expected) -> None:
    with pytest.raises(UserError, match=rf"^TensorRT 10.9.0 cannot parse .*\.onnx: {expected}$"):
        plan_of(model, tmp_path, fake_tensorrt(refuse=error), float16_rest=False)


def test_tensorrt_without_a_gpu_says_what_builds_without_one(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("act_pipeline.engines.tensorrt.plan.current_gpu", lambda: None)
    with pytest.raises(UserError, match=r"TensorRT 10.9.0 builds on the GPU .*act_pipeline\[tensorrt-rtx\]"):
        build_plan(model, tmp_path / "a.plan", trt=fake_tensorrt(), options=FLOAT32_REST, say=quiet)


# The plan cache.


def load(model, trt=None, **options) -> tuple[TensorRTEngine, list[str]]:
    said: list[str] = []
    options = {"precision": "int8", "float16_rest": False, "cuda": fake_cuda(), **options}
    engine = TensorRTEngine(model, tensorrt=trt or fake_tensorrt(), say=said.append, **options)
    return engine, said


def test_a_plan_is_built_once(model) -> None:
    trt = fake_tensorrt()
    first, said = load(model, trt)
    assert trt.module.builds == 1 and len(said) == 1 and "builds the engine" in said[0]
    second, said = load(model, trt)
    assert trt.module.builds == 1 and said == [] and second.plan_path == first.plan_path
    assert first.plan_path.parent == model.directory / "trt_cache"


def test_build_plan_fills_the_cache_that_the_engine_looks_in(model) -> None:
    trt = fake_tensorrt()
    build_plan(model, None, "int8", 1, say=quiet, options=FLOAT32_REST, trt=trt, gpu=GPU)
    assert load(model, trt)[1] == []


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"float16_rest": True}])
def test_another_profile_or_option_is_another_plan(model, change) -> None:
    trt = fake_tensorrt()
    load(model, trt)
    said = load(model, trt, **change)[1]
    assert trt.module.builds == 2 and len(said) == 1 and "builds the engine" in said[0]


def test_a_plan_of_another_version_or_gpu_is_built_anew_and_said_so(model) -> None:
    load(model)
    newer = fake_tensorrt("10.13.0")
    said = load(model, newer)[1]
    assert newer.module.builds == 1 and len(said) == 1
    assert "is of tensorrt 10.9.0 for Test GPU" in said[0] and "here is tensorrt 10.13.0" in said[0]
    said = load(model, cuda=fake_cuda(name="Other GPU", compute_capability=(9, 0)))[1]
    assert "here is tensorrt 10.9.0 for Other GPU, compute capability 9.0: built anew" in said[0]
    assert load(model)[1] == [], "the first one is still there"


@pytest.mark.parametrize("damage", ["plan", "record", "no record"])
def test_a_damaged_plan_is_built_anew_without_being_loaded(model, damage) -> None:
    trt = fake_tensorrt()
    path = load(model, trt)[0].plan_path
    if damage == "plan":
        path.write_bytes(path.read_bytes()[:10])
    elif damage == "record":
        path.with_suffix(".json").write_text("{")
    else:
        path.with_suffix(".json").unlink()
    loaded = trt.module.loaded
    said = load(model, trt)[1]
    assert said == [f"{path} is damaged: built anew"]
    assert trt.module.builds == 2 and trt.module.loaded == loaded + 1


def test_a_whole_plan_that_does_not_load_is_built_anew(model) -> None:
    trt = fake_tensorrt()
    path = load(model, trt)[0].plan_path
    other = json.dumps({**json.loads(path.read_bytes()), "version": "0"}).encode()
    from act_pipeline.engines.tensorrt.plan import _hash

    record = json.loads(path.with_suffix(".json").read_text())
    path.write_bytes(other)
    path.with_suffix(".json").write_text(json.dumps({**record, "plan_hash": _hash(other)}))
    assert load(model, trt)[1] == [f"{path} is refused by TensorRT 10.9.0: built anew"]
    assert trt.module.builds == 2


def test_a_gpu_that_loads_nothing_is_said_so(model) -> None:
    with pytest.raises(UserError, match="does not load it; TensorRT-RTX runs on GeForce RTX"):
        load(model, fake_tensorrt("1.7.1", "tensorrt_rtx", loads=False))


# How it runs.


def test_it_gives_the_rows_of_every_image(model) -> None:
    engine, _ = load(model, batch_size=4)
    assert engine.last_device_ms is None
    for count in (1, 4, 2):  # the second image has two rows
        inputs = batch(count)
        result = engine.run(inputs)
        assert result["bbox_num"].tolist() == [1, 2, 1, 1][:count] and result["bbox_num"].dtype == np.int32
        assert result["bbox"].shape == (result["bbox_num"].sum(), 6) and result["bbox"].dtype == np.float32
        np.testing.assert_allclose(result["bbox"][0, 2:], np.float32(OBJECT) * SIZE * 2)
        np.testing.assert_allclose(result["bbox"][[0, -1], 1], inputs["image"][[0, -1], 0, 0, 0])
    assert engine.last_device_ms == 1.25


def test_results_stay_when_the_next_batch_runs(model) -> None:
    engine, _ = load(model, batch_size=2)
    first = engine.run(batch(2))
    kept = first["bbox"].copy()
    engine.run({**batch(2), "image": np.zeros((2, 3, SIZE, SIZE), np.float32)})
    np.testing.assert_array_equal(first["bbox"], kept)


def test_closing_frees_all_memory_and_the_stream(model) -> None:
    runtime = FakeCudaRuntime()
    engine, _ = load(model, cuda=Cuda(runtime), batch_size=2)
    engine.run(batch(1))
    engine.run(batch(2))
    assert runtime.memory and runtime.streams == 1
    engine.close()
    engine.close()
    assert not runtime.memory and runtime.streams == 0


def test_a_batch_over_the_profile_names_its_largest_and_the_flag(model) -> None:
    engine, _ = load(model, batch_size=2)
    with pytest.raises(UserError, match=r"batches up to 2, this one has 3; .*--batch_size=3"):
        engine.run(batch(3))


def test_a_file_of_a_fixed_batch(model) -> None:
    fixed = lowered_onnx(model, "tensorrt", batch=2)
    assert load(fixed, batch_size=2)[0].run(batch(2))["bbox_num"].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"is for batches of 2, asked for --batch_size=1; set it to 2"):
        load(fixed)


def test_versions_and_settings_are_recorded(model) -> None:
    engine, _ = load(model)
    assert engine.versions()["tensorrt"] == "10.9.0" and engine.versions()["cuda"] == "12.9"
    assert engine.settings["gpu"] == "Test GPU, compute capability 8.6"
    assert engine.artifact.path.name == "model_tensorrt.onnx"


def test_a_failing_call_is_one_line(model) -> None:
    runtime = FakeCudaRuntime()
    engine, _ = load(model, cuda=Cuda(runtime))
    code = type("Code", (int,), {"name": "cudaErrorIllegalAddress"})(700)
    runtime.cudaStreamSynchronize = lambda stream: (code,)
    with pytest.raises(UserError, match="cannot run .*: cudaStreamSynchronize: cudaErrorIllegalAddress$"):
        engine.run(batch(1))
    with pytest.raises(CudaError):
        Cuda(runtime).call("cudaStreamSynchronize", 0)


# Rejected requests.


def test_what_is_refused(model, float_model, tmp_path) -> None:
    with pytest.raises(UserError, match="runs on the GPU only, found --device=CPU"):
        load(model, device="CPU")
    with pytest.raises(UserError, match="cannot run here: CUDA finds no GPU"):
        load(model, cuda=fake_cuda(name=None))
    with pytest.raises(UserError, match="is a float model, asked for int8"):
        load(float_model)
    with pytest.raises(UserError, match="is an INT8 model, asked for fp32"):
        load(model, precision="fp32")
    with pytest.raises(UserError, match="precision is 'bf16', TensorRT has fp32, fp16, int8"):
        load(model, precision="bf16")
    with pytest.raises(UserError, match="--batch_size is 0, expected a positive integer"):
        load(model, batch_size=0)
    with pytest.raises(UserError, match="has the Q/DQ of --target cpu .* which TensorRT refuses"):
        load(lowered_onnx(model, "cpu"))
    with pytest.raises(UserError, match="holds FP32 weights, asked for FP16"):
        load(lowered_onnx(float_model, "tensorrt"), precision="fp16")
    with pytest.raises(UserError, match="TensorRT builds for the GPU that it builds on"):
        options = BuildOptions(float16_rest=False, compute_capability="8.9")
        build_plan(model, tmp_path / "a.plan", trt=fake_tensorrt(), gpu=GPU, options=options, say=quiet)


def test_refusals_say_what_to_install(monkeypatch) -> None:
    here = dataclasses.replace(GPU_MACHINE, nvidia_gpus=("Test GPU",), packages={"onnx": "1.23.2"})
    rtx = module.FLAVOURS[1]
    monkeypatch.setattr("act_pipeline.engines.tensorrt.engine.installed", lambda: [rtx])
    monkeypatch.setattr("act_pipeline.engines.tensorrt.engine.has_cudart", lambda: True)
    assert tensorrt_refusal(here) is None and tensorrt_versions().startswith("TensorRT-RTX")
    why, remedy = tensorrt_refusal(dataclasses.replace(here, nvidia_gpus=(), absent={"nvidia_gpus": "no GPU at all"}))
    assert why == "no GPU at all" and "deploy/build_engine.py" in remedy and "--engine=auto" in remedy
    assert tensorrt_refusal(dataclasses.replace(here, packages={}))[0] == "onnx is not installed"
    monkeypatch.setattr("act_pipeline.engines.tensorrt.engine.has_cudart", lambda: False)
    assert "cuda-bindings" in tensorrt_refusal(here)[1]
    monkeypatch.setattr("act_pipeline.engines.tensorrt.engine.installed", list)
    assert "act_pipeline[tensorrt-rtx]" in tensorrt_refusal(here)[1]


def test_a_module_that_cannot_be_imported_gives_way_to_the_other(monkeypatch) -> None:
    def importing(name: str):
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        return fake_tensorrt("1.7.1").module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module.importlib, "import_module", importing)
    assert module.import_tensorrt().name == "tensorrt_rtx"
    monkeypatch.setattr(module, "FLAVOURS", module.FLAVOURS[:1])
    with pytest.raises(
        UserError, match=r"tensorrt cannot be imported \(libnvinfer.so.10.*act_pipeline\[tensorrt-rtx\]"
    ):
        module.import_tensorrt()


def test_asking_for_support_imports_nothing_of_nvidia() -> None:
    source = (
        "import sys; from act_pipeline.engines.tensorrt.engine import tensorrt_refusal, tensorrt_versions; "
        "from act_pipeline.engines.machine import Machine; "
        "tensorrt_refusal(Machine('cpu', 1, None)); tensorrt_versions(); "
        "sys.exit(any(name.startswith(('tensorrt', 'cuda.')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", source], cwd=REPOSITORY, check=False).returncode == 0
