"""Model folders as people have them: other file names, and models of Paddle 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from act_pipeline.engines.model_files import inspect_model
from act_pipeline.errors import UserError, run_command
from act_pipeline.model import InferenceModel, open_model
from act_pipeline.static_graph import StaticGraph, static_mode

# The beginning of a program as Paddle 3 writes it.
PIR = {"base_code": {"magic": "pir", "trainable": True, "version": 1}, "program": {"regions": []}}


def renamed(model: InferenceModel, folder: Path, program: str, parameters: str) -> Path:
    folder.mkdir()
    shutil.copyfile(model.model_path, folder / program)
    shutil.copyfile(model.params_path, folder / parameters)
    return folder


@pytest.mark.parametrize(
    ("program", "parameters"),
    [
        ("inference.pdmodel", "inference.pdiparams"),  # PaddleX 4745, 4132
        ("rtdetr.pdmodel", "rtdetr.pdiparams"),
        ("rtdetr.pdmodel", "weights.pdiparams"),
        ("model.pdmodel", "inference.pdiparams"),
    ],
)
def test_a_pair_of_other_names_is_found(
    float_model: InferenceModel, tmp_path: Path, program: str, parameters: str
) -> None:
    folder = renamed(float_model, tmp_path / "model", program, parameters)
    (folder / "rtdetr.pdiparams.info").write_bytes(b"of PaddleX")
    for path in (folder, folder / program):
        found = open_model(path)
        assert (found.directory, found.model_filename, found.params_filename) == (folder, program, parameters)
    assert inspect_model(found) == inspect_model(float_model)
    with static_mode():
        graph = StaticGraph.load(found)
        assert sorted(graph.feed_names) == ["im_shape", "image", "scale_factor"]
        graph.close()


def test_the_usual_names_come_first(float_model: InferenceModel, int8_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "model.pdmodel", "model.pdiparams")
    for name in ("inference", "another"):
        shutil.copyfile(int8_model.model_path, folder / f"{name}.pdmodel")
        shutil.copyfile(int8_model.params_path, folder / f"{name}.pdiparams")
    assert InferenceModel.load(folder).content_hash() == float_model.content_hash()
    (folder / "model.pdmodel").unlink()
    assert InferenceModel.load(folder).content_hash() == int8_model.content_hash()
    (folder / "inference.pdmodel").unlink()
    assert InferenceModel.load(folder).params_filename == "another.pdiparams"


def test_several_programs_are_a_question(float_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "a.pdmodel", "a.pdiparams")
    shutil.copyfile(float_model.model_path, folder / "b.pdmodel")
    with pytest.raises(UserError, match=r"2 \.pdmodel files \(a\.pdmodel, b\.pdmodel\).*model_filename"):
        InferenceModel.load(folder)
    assert InferenceModel.load(folder, "b.pdmodel").params_filename == "a.pdiparams"


@pytest.mark.parametrize("name", ["inference.json", "model.json", "rtdetr.json"])
def test_a_model_of_paddle_3_is_named(float_model: InferenceModel, tmp_path: Path, name: str) -> None:
    """PaddleX 4745: the folder, the file in it, and the file by ``model_filename``."""
    folder = renamed(float_model, tmp_path / "model", name, "inference.pdiparams")
    (folder / name).write_text(json.dumps(PIR, separators=(",", ":")), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for path, names in ((folder, ()), (folder / name, ()), (folder, (name, "inference.pdiparams"))):
        with pytest.raises(UserError, match=f"{name} is a model of Paddle 3 .*export it again") as error:
            open_model(path, *names)
        assert "config.json" not in str(error.value)


def test_an_empty_folder_still_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pdmodel is missing in the model folder"):
        InferenceModel.load(tmp_path)
    (tmp_path / "model.pdmodel").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.pdiparams is missing"):
        InferenceModel.load(tmp_path)


def test_the_description_beside_it_is_found(float_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "inference.pdmodel", "inference.pdiparams")
    (folder / "inference.yml").write_text("label_list: [disc, square]\n", encoding="utf-8")
    assert InferenceModel.load(folder).infer_cfg() == {"label_list": ["disc", "square"]}
    (folder / "infer_cfg.yml").write_text("label_list: [a, b]\n", encoding="utf-8")
    assert InferenceModel.load(folder).infer_cfg() == {"label_list": ["a", "b"]}


def test_every_command_takes_a_pair_of_other_names(
    float_model: InferenceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy import export_onnx
    from inference_fixtures import TinyReader, make_tiny_data

    from act_pipeline.inference import run_inference
    from act_pipeline.infer_request import InferenceRequest

    folder = renamed(float_model, tmp_path / "model", "inference.pdmodel", "inference.pdiparams")
    output = tmp_path / "model.onnx"
    assert run_command(export_onnx.main, [f"--model_path={folder}", f"--output={output}"]) == 0 and output.is_file()
    annotations = make_tiny_data(tmp_path / "data")
    reader = TinyReader(annotations, annotations.parent / "images")
    for engine in ("paddle", "paddle_onednn", "openvino", "onnxruntime"):
        if engine in ("openvino", "onnxruntime"):
            pytest.importorskip(engine)
        request = InferenceRequest(model_path=str(folder), engine=engine, precision="fp32", device="CPU")
        outcome = run_inference(request, reader=reader)
        assert outcome.record["map"] == pytest.approx(1.0), engine
