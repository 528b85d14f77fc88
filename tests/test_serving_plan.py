"""A version with a TensorRT plan: kept with its ONNX file, loaded where TensorRT is, left aside elsewhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import described
from inference_fixtures import GPU_MACHINE, OBJECT, SIZE
from server_fixtures import HERE
from tensorrt_fixtures import fake_cuda, fake_tensorrt

from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel, PlanModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.engines.tensorrt.cudart import Gpu
from act_pipeline.engines.tensorrt.plan import build_plan
from act_pipeline.server.items import Found, Prepared
from act_pipeline.server.model import LoadedModel, served_model
from act_pipeline.server.settings import Limits
from act_pipeline.serving import Repository, promote


def built(model: InferenceModel, folder: Path) -> Path:
    """Build a plan as a bundle's build.sh does: ``model.plan`` with ``model.onnx`` beside it, and no record."""
    build_plan(model, folder / "made.plan", trt=fake_tensorrt(), gpu=Gpu("Test GPU", (8, 6)), say=lambda line: None)
    (folder / "bundle").mkdir()
    shutil.copyfile(json.loads((folder / "made.json").read_text())["onnx"], folder / "bundle" / "model.onnx")
    return Path(shutil.copyfile(folder / "made.plan", folder / "bundle" / "model.plan"))


@pytest.fixture
def model(int8_model, tmp_path: Path) -> InferenceModel:
    return described(int8_model, tmp_path / "int8")


@pytest.fixture
def plan(model: InferenceModel, tmp_path: Path) -> Path:
    return built(model, tmp_path)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.open(tmp_path / "repository", create=True)


def test_a_plan_is_kept_with_its_version(model, plan, repository, capsys) -> None:
    flags = ["promote", "--repository", str(repository.folder), "--model_path", str(model.directory), "--force"]
    assert main([*flags, "--plan", str(plan)]) == 0
    kept = PlanModel.load(repository.folder_of(1) / "model.plan")
    assert kept.content_hash() == PlanModel.load(plan).content_hash()
    assert kept.path.with_suffix(".onnx").read_bytes() == plan.with_suffix(".onnx").read_bytes()
    # The same model with the same plan is the same version; without it, or with another one, it is a new one.
    assert main([*flags, "--share", "50"]) == 0 and repository.state().candidate == 2
    assert not (repository.folder_of(2) / "model.plan").exists()
    assert main([*flags[:3], "--version", "2", "--force"]) == 0 and main([*flags, "--plan", str(plan)]) == 0
    assert repository.state().live == 1 and repository.numbers() == [1, 2]
    capsys.readouterr()
    assert run_command(main, [*flags[:3], "--version", "2", "--plan", str(plan)]) == 2
    assert "comes with a new version" in capsys.readouterr().err


def test_a_server_with_tensorrt_loads_the_plan(model, plan, repository, monkeypatch) -> None:
    from act_pipeline.engines import registry
    from act_pipeline.engines.tensorrt import engine
    from act_pipeline.server import model as server

    here, trt = dataclasses.replace(GPU_MACHINE, nvidia_gpus=("Test GPU",)), fake_tensorrt()
    monkeypatch.setattr(registry, "tensorrt_refusal", lambda here: None)
    monkeypatch.setattr(registry, "tensorrt_versions", lambda: "TensorRT 10.9.0")
    monkeypatch.setattr(server, "machine", lambda: here)
    monkeypatch.setattr("act_pipeline.engines.machine", lambda: here)
    monkeypatch.setattr(engine, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(engine, "Cuda", fake_cuda)
    version, _ = promote(repository, model.directory, force=True, plan=plan)
    served = served_model(version.folder)
    assert (served.engine, served.device, served.why) == ("tensorrt", "GPU", "the plan of the version")
    assert served.artifact == PlanModel(version.folder / "model.plan") and served.input_size == (SIZE, SIZE)
    loaded = LoadedModel(served, 1, 4, Limits())
    loaded.warm()
    found = loaded.run([Prepared(np.full((3, SIZE, SIZE), value, np.float32)) for value in (0.75, 0.5, 0.25)])
    assert trt.module.builds == 0 and loaded.sizes == [4, 2, 1]
    for outcome, value in zip(found, (0.75, 0.5, 0.25)):
        assert isinstance(outcome, Found)
        np.testing.assert_allclose(outcome.bbox[0], [0, value, *(SIZE * np.float32(OBJECT))], rtol=1e-5)
    loaded.close()


def test_a_server_without_tensorrt_leaves_the_plan_aside(model, plan, repository, monkeypatch) -> None:
    from act_pipeline.server import model as server

    monkeypatch.setattr(server, "machine", lambda: dataclasses.replace(HERE, paddle="2.6.2"))
    version, _ = promote(repository, model.directory, force=True, plan=plan)
    served = served_model(version.folder)
    assert served.engine == "openvino" and "its plan is left aside: " in served.why


def test_a_plan_that_does_not_belong_to_the_model_is_one_line(model, float_model, plan, repository, tmp_path) -> None:
    other = described(float_model, tmp_path / "fp32")
    with pytest.raises(UserError, match=r"model.plan is of another model than .*fp32: INT8 True, expected False"):
        promote(repository, other.directory, force=True, plan=plan)
    plan.with_suffix(".onnx").unlink()
    with pytest.raises(UserError, match="put the ONNX file that it was built from there"):
        promote(repository, model.directory, force=True, plan=plan)
    with pytest.raises(UserError, match="plan .*none.plan does not exist"):
        promote(repository, model.directory, force=True, plan=tmp_path / "none.plan")
    assert repository.state().live is None and repository.numbers() == []
