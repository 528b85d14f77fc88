"""TensorRT plans as models of `eval` and `benchmark`, and engines for named devices."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import GPU_MACHINE, OBJECT, SIZE
from tensorrt_fixtures import fake_cuda, fake_tensorrt

from act_pipeline.benchmark.plan import BenchmarkRequest, Models, candidates
from act_pipeline.core.artifacts import InferenceModel, PlanModel, open_model
from act_pipeline.core.errors import UserError
from act_pipeline.engines import create_engine, inspect_artifact
from act_pipeline.engines.onnx_runtimes.onnx_files import onnx_artifact
from act_pipeline.engines.tensorrt.build import BuildOptions
from act_pipeline.engines.tensorrt.cudart import Gpu
from act_pipeline.engines.tensorrt.engine import TensorRTEngine
from act_pipeline.engines.tensorrt.plan import build_plan
from act_pipeline.engines.tensorrt.targets import TARGETS
from act_pipeline.inference.engine_selection import choose_engine
from act_pipeline.inference.request import InferenceRequest

GPU = Gpu("Test GPU", (8, 6))


@pytest.fixture
def plan(int8_model, tmp_path) -> PlanModel:
    """A plan that `build_engine` made, beside its record; the ONNX file is in the model's folder."""
    shutil.copytree(int8_model.directory, tmp_path / "int8")
    model = InferenceModel.load(tmp_path / "int8")
    build_plan(model, tmp_path / "model.plan", trt=fake_tensorrt(), gpu=GPU, say=lambda line: None)
    loaded = open_model(tmp_path / "model.plan")
    assert isinstance(loaded, PlanModel)
    return loaded


def load(plan: PlanModel, **options) -> TensorRTEngine:
    trt = options.pop("tensorrt", None) or fake_tensorrt()
    return TensorRTEngine(plan, "int8", tensorrt=trt, cuda=fake_cuda(), **options)


def batch(count: int) -> dict[str, np.ndarray]:
    return {
        "image": np.full((count, 3, SIZE, SIZE), 0.75, np.float32),
        "im_shape": np.full((count, 2), SIZE, np.float32),
        "scale_factor": np.full((count, 2), 0.5, np.float32),
    }


def test_a_plan_is_loaded_as_it_is_and_detects(plan) -> None:
    trt = fake_tensorrt()
    engine = load(plan, tensorrt=trt, batch_size=2)
    found = engine.run(batch(2))
    assert trt.module.builds == 0 and engine.plan_path == plan.path and engine.artifact == plan
    np.testing.assert_allclose(found["bbox"][0], [0, 0.75, *(2 * SIZE * np.float32(OBJECT))], rtol=1e-6)
    assert found["bbox_num"].tolist() == [1, 2]
    engine.close()


def test_a_plan_of_trtexec_is_described_by_the_file_beside_it(plan, tmp_path) -> None:
    onnx = json.loads(plan.path.with_suffix(".json").read_text())["onnx"]
    (tmp_path / "there").mkdir()
    shutil.copy(plan.path, tmp_path / "there" / "model.engine")
    moved = open_model(tmp_path / "there" / "model.engine")
    with pytest.raises(
        UserError, match="model.engine does not tell what its outputs mean, and .*model.onnx is not there"
    ):
        inspect_artifact(moved)
    shutil.copy(onnx, tmp_path / "there" / "model.onnx")
    summary = inspect_artifact(moved)
    assert summary.quantized and summary.input_size == (SIZE, SIZE)
    assert load(moved).run(batch(1))["bbox"].shape == (1, 6)


def test_a_plan_of_another_onnx_file_is_refused(plan) -> None:
    onnx = Path(json.loads(plan.path.with_suffix(".json").read_text())["onnx"])
    onnx.write_bytes(onnx.read_bytes() + b"\x00")
    with pytest.raises(UserError, match="was built from another file than .* is now; build it again"):
        inspect_artifact(plan)


def test_plans_that_do_not_load_say_why(plan, tmp_path) -> None:
    with pytest.raises(UserError, match="a plan runs with the version and on the GPU that it was built with"):
        load(plan, tensorrt=fake_tensorrt("10.13.0"))
    with pytest.raises(UserError, match="is for batches up to 4, asked for --batch_size=8"):
        load(plan, batch_size=8)
    plan.path.write_bytes(plan.path.read_bytes()[:-3])
    with pytest.raises(UserError, match="is damaged: it is not the plan of the record beside it"):
        load(plan)
    (tmp_path / "empty.plan").touch()
    with pytest.raises(UserError, match="empty.plan is empty"):
        open_model(tmp_path / "empty.plan")
    with pytest.raises(UserError, match="plan .*none.plan does not exist"):
        open_model(tmp_path / "none.plan")


def test_only_tensorrt_runs_a_plan(plan) -> None:
    with pytest.raises(UserError, match="is a TensorRT plan, which openvino does not run"):
        create_engine("openvino", plan, "int8")
    here = dataclasses.replace(GPU_MACHINE, nvidia_gpus=("Test GPU",))
    for engine in (None, "auto"):
        choice = choose_engine(InferenceRequest(model_path=str(plan.path), engine=engine), plan, True, here)
        assert (choice.name, choice.precision, choice.device) == ("tensorrt", "int8", "GPU")


def test_a_plan_is_no_onnx_file(plan) -> None:
    """It was taken for one: parsed by TensorRT, or named so in a message."""
    with pytest.raises(UserError, match="model.plan is a TensorRT plan already, expected a model folder or an ONNX"):
        build_plan(plan, trt=fake_tensorrt(), gpu=GPU, say=lambda line: None)
    with pytest.raises(UserError, match="model.plan is a TensorRT plan, expected a model folder or an ONNX file"):
        onnx_artifact(plan)
    request = InferenceRequest(model_path=str(plan.path), collect_shape_only=True)
    with pytest.raises(UserError, match="model.plan is a TensorRT plan, expected a model folder to collect shapes of"):
        choose_engine(request, plan, True, GPU_MACHINE)
    assert not hasattr(plan, "record")


def test_a_benchmark_runs_a_plan_in_tensorrt_alone(plan, monkeypatch) -> None:
    from act_pipeline.engines import registry

    monkeypatch.setattr(registry, "tensorrt_refusal", lambda here: None)
    monkeypatch.setattr(registry, "tensorrt_versions", lambda: "TensorRT 10.9.0")
    request = BenchmarkRequest(int8_model_path=str(plan.path), device="GPU")
    models = Models.of(request)
    assert models.input_size == (SIZE, SIZE) and models.note == "no --model_path: int8 rows only, and no ratios to fp32"
    found, _ = candidates(request, models, 1, GPU_MACHINE)
    assert [(row.engine, row.model) for row in found] == [("tensorrt", plan)]
    with pytest.raises(UserError, match="is an INT8 model, expected an FP32 one|INT8 model"):
        Models.of(BenchmarkRequest(model_path=str(plan.path)))


@pytest.mark.parametrize(
    ("target", "builder", "gpu", "message"),
    [
        ("nano", "tensorrt_rtx", None, "has no INT8; give the float model's folder"),
        ("xavier", "tensorrt_rtx", None, "is built on the device, by TensorRT 8.5 of JetPack 5.1: make a bundle"),
        ("orin", "tensorrt", GPU, "by TensorRT 10 of JetPack 6.1 or 6.2, TensorRT 11 of JetPack 7.2.2"),
        (
            "cpu",
            "tensorrt",
            GPU,
            "needs no engine: make a bundle with deploy/bundle.py --target=cpu, and run its run.py",
        ),
        ("rtx", "tensorrt", GPU, "needs TensorRT-RTX, and TensorRT would build here"),
        ("t4", "tensorrt", GPU, "has compute capability 7.5, the GPU here 8.6"),
    ],
)
def test_an_engine_that_the_target_cannot_run_is_not_built(int8_model, tmp_path, target, builder, gpu, message) -> None:
    trt = fake_tensorrt("1.7.1" if builder == "tensorrt_rtx" else "10.9.0", builder)
    with pytest.raises(UserError, match=message):
        build_plan(int8_model, tmp_path / "x.plan", trt=trt, gpu=gpu, target=TARGETS[target], say=lambda line: None)
    assert trt.module.builds == 0 and not (tmp_path / "x.plan").exists()


def test_the_target_s_compute_capability_is_built_for(int8_model, tmp_path, monkeypatch) -> None:
    from act_pipeline.engines.tensorrt import plan as plans

    monkeypatch.setattr(plans, "current_gpu", lambda: None)
    model = InferenceModel.load(shutil.copytree(int8_model.directory, tmp_path / "int8"))

    def built(target: str, builder: str, gpu: Gpu | None = None, **options) -> str:
        trt = fake_tensorrt("1.7.1" if builder == "tensorrt_rtx" else "10.9.0", builder)
        record = build_plan(
            model, tmp_path / "x.plan", trt=trt, gpu=gpu, target=TARGETS[target], options=BuildOptions(**options),
            say=lambda line: None,
        )  # fmt: skip
        return record.recipe.built_for

    assert built("t4", "tensorrt_rtx") == "SM75"
    assert built("rtx", "tensorrt_rtx") == "portable"
    assert built("rtx", "tensorrt_rtx", compute_capability="8.9") == "SM89"
    assert built("a10", "tensorrt", GPU) == str(GPU)
    with pytest.raises(UserError, match="--compute_capability=8.9 contradicts --target=t4, which has 7.5"):
        built("t4", "tensorrt_rtx", compute_capability="8.9")
