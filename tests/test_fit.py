"""A reader is checked against its model before any work, in every command: classes by name, preprocessing, padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from inference_fixtures import SHARED, make_tiny_data, write_reader

from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader
from act_pipeline.evaluation import evaluate
from act_pipeline.graph.detector_graph import DetectorGraph
from act_pipeline.inference import InferenceRequest, run_inference

BCCD = SHARED / "models" / "bccd"
BCCD_DATA = SHARED / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD_DATA.is_dir() or not BCCD.is_dir(), reason="the blood cells are not at hand")
BCCD_FIRST_EIGHT = 0.5444  # mAP of ../shared/models/bccd on the first eight test images, in Paddle Inference

PREPROCESS = [
    {"type": "Resize", "target_size": [32, 32], "keep_ratio": False, "interp": 2},
    {"type": "NormalizeImage", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"},
    {"type": "Permute"},
]


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    """A reader file for 24 images of one disc each, category 7; category 3 has no box."""
    return write_reader(tmp_path / "reader.yml", make_tiny_data(tmp_path / "data", 24).parent)


@pytest.fixture()
def model(float_model, tmp_path: Path) -> InferenceModel:
    """The tiny model, which detects the disc as class 0, in a folder per test."""
    return InferenceModel.load(shutil.copytree(float_model.directory, tmp_path / "model"))


def describe(model: InferenceModel, labels: list[str] | None = None, steps: Any = None) -> None:
    content = {"Preprocess": steps, "label_list": labels}
    model.infer_cfg_path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value}))


def categories(config: Path, *names: str, ids: tuple[int, ...] = (7, 3), **more: Any) -> None:
    path = config.parent / "data" / "annotations.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": id_, "name": name, **more} for id_, name in zip(ids, names)]
    path.write_text(json.dumps(content))


def map_of(model: InferenceModel, reader: Path, say=lambda line: None) -> float:
    request = InferenceRequest(model_path=str(model.directory), reader_config=str(reader), device="CPU", cpu_threads=1)
    return run_inference(request, say=say).evaluation.map


def refusal(model: InferenceModel, reader: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        fit_reader(model, Reader.load(reader, overrides)).reader.check("eval")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_categories_in_another_order_are_matched_by_name(model, config, caplog) -> None:
    describe(model, ["disc", "square"])
    expected = map_of(model, config)
    assert expected > 0.9
    categories(config, "Square", " disc", ids=(3, 7))
    assert map_of(model, config) == expected
    assert "another order than" in caplog.text and "label_list; matched by name" in caplog.text
    describe(model, ["square", "disc"])  # now the model labels its detections as squares
    assert map_of(model, config) < 0.01


def test_scores_by_class_keep_their_names_in_another_order(model, config) -> None:
    from act_pipeline.engines import create_engine

    describe(model, ["disc", "square"])
    categories(config, "background", "square", "disc", ids=(0, 3, 7))
    fit = fit_reader(model, Reader.load(config, ["num_classes=5"]))
    assert "num_classes is 5, but the model has 2 classes" in fit.notes[0] and len(fit.notes) == 1
    reader = fit.reader
    assert reader.category_ids == [7, 3] and reader.class_names == ["disc", "square"] and reader.num_classes == 2
    per_class = evaluate(create_engine("paddle", model, "fp32", "CPU", 1), reader, progress=False).per_class
    assert set(per_class) == {"disc", "square"} and per_class["disc"] > 0.9 and per_class["square"] is None


def test_a_root_category_without_boxes_is_left_out(model, config, caplog) -> None:
    describe(model, ["disc", "square"])
    expected = map_of(model, config)
    categories(config, "shapes", "disc", "square", ids=(0, 7, 3))
    assert map_of(model, config) == expected
    assert "category 'shapes' (id 0) has no box and is none of the model's 2 classes; left out" in caplog.text
    categories(config, "disc", "disc", "square", ids=(0, 7, 3))  # Roboflow's root often has a class's name
    assert map_of(model, config) == expected


def test_without_names_the_message_says_which_category_is_extra(model, config, monkeypatch) -> None:
    describe(model, ["class_0", "class_1"])
    categories(config, "shapes", "disc", "square", ids=(0, 7, 3), supercategory="shapes")
    message = refusal(model, config)
    assert "the model has 2 classes" in message and "3 categories (shapes, disc, square)" in message
    assert "category 'shapes' (id 0) has no box" in message and "num_classes" not in message
    model.infer_cfg_path.unlink()  # only the graph has the number of classes
    monkeypatch.setattr("act_pipeline.data.model_fit.read_detector_graph", lambda model: DetectorGraph(num_classes=2))
    assert "the model has 2 classes" in refusal(model, config)


def test_a_reader_without_a_model_names_the_extra_category_too(config) -> None:
    categories(config, "shapes", "disc", "square", ids=(0, 7, 3), supercategory="shapes")
    with pytest.raises(UserError, match=r"num_classes is 2, but .* 3 categories .*'shapes' \(id 0\) has no box"):
        Reader.load(config, ["num_classes=2"]).check("eval")


def test_names_that_do_not_fit_are_one_line(model, config) -> None:
    describe(model, ["ring", "square"])
    message = refusal(model, config)
    assert "has no category named ring" in message and "its categories are disc, square" in message
    describe(model, ["square"])
    assert "category 'disc' (id 7) has boxes and is none of the model's (square)" in refusal(model, config)
    describe(model, ["disc", "disc"])
    assert "names a class twice" in refusal(model, config)


def test_names_that_are_only_numbers_leave_the_files_order(model, config, caplog) -> None:
    describe(model, ["class_0", "class_1"])
    assert map_of(model, config) > 0.9
    assert "not in the order of their ids, and the model's class names are not known" in caplog.text


def test_cocos_names_on_a_model_of_other_classes_are_not_believed(model, config, monkeypatch) -> None:
    names = ["person", *(f"thing {index}" for index in range(79))]
    describe(model, names)
    monkeypatch.setattr("act_pipeline.data.model_fit.read_detector_graph", lambda model: DetectorGraph(num_classes=2))
    said: list[str] = []
    assert map_of(model, config, said.append) > 0.9
    assert any("COCO's 80 names" in line and "has 2 classes" in line for line in said)
    describe(model, names[:3])
    assert "names 3 classes (person, thing 0, thing 1), but the model has 2" in refusal(model, config)


def test_the_training_images_may_have_other_categories(model, config) -> None:
    """Their boxes are not used."""
    describe(model, ["disc", "square"])
    other = json.loads((config.parent / "data" / "annotations.json").read_text())
    other["categories"][0]["name"] = "ring"
    (config.parent / "data" / "train.json").write_text(json.dumps(other))
    reader = fit_reader(model, Reader.load(config, ["TrainDataset.anno_path=train.json"])).reader
    reader.check("train", "eval")
    assert reader.fingerprint("train") != reader.fingerprint("eval")


def test_the_fingerprint_knows_the_order_of_classes(model, config) -> None:
    before = Reader.load(config).fingerprint()
    describe(model, ["disc", "square"])
    assert fit_reader(model, Reader.load(config)).reader.fingerprint() == before
    describe(model, ["square", "disc"])
    assert fit_reader(model, Reader.load(config)).reader.fingerprint() != before


def test_shards_and_one_process_number_the_classes_alike(model, config) -> None:
    from act_pipeline.engines import create_engine
    from act_pipeline.evaluation import sharded

    describe(model, ["disc", "square"])
    categories(config, "square", "disc", ids=(3, 7))
    reader = fit_reader(model, Reader.load(config)).reader
    engine = create_engine("paddle", model, "fp32", "CPU", 1)
    found = sharded.evaluate_in_shards(engine, model, reader, 1, progress=False).evaluation
    assert found.map == evaluate(engine, reader, progress=False).map > 0.9


# --- preprocessing ---------------------------------------------------------------------------------------------------


def with_step(name: str, **arguments: Any) -> list[dict[str, Any]]:
    return [{**step, **arguments} if step["type"] == name else step for step in PREPROCESS]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (with_step("Resize", keep_ratio=True), "keep_ratio: False, but the model was exported with keep_ratio: True"),
        (with_step("Resize", interp=1), "Resize has interp: 2, but the model was exported with interp: 1"),
        (
            with_step("NormalizeImage", norm_type="mean_std", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            "NormalizeImage has mean: [0.0, 0.0, 0.0], std: [1.0, 1.0, 1.0], norm_type: none, but",
        ),
        (with_step("NormalizeImage", is_scale=False), "NormalizeImage has is_scale: True, but"),
        (with_step("NormalizeImage", norm_type="mean_std", std=[1.0, 0.5]), "expected three numbers each"),
        ([*PREPROCESS[:1], {"type": "Pad", "size": [32, 32]}, *PREPROCESS[1:]], "lack Pad, but the model was exported"),
        ([PREPROCESS[0], PREPROCESS[2]], "names none in Preprocess, and the graph does not normalize either"),
        ("Resize", "Preprocess is no list of steps"),
    ],
)
def test_a_contradiction_is_one_line(model, config, steps, words) -> None:
    describe(model, steps=steps)
    message = refusal(model, config)
    assert words in message and "infer_cfg.yml" in message


@pytest.mark.parametrize(
    "steps",
    [
        None,
        PREPROCESS,
        with_step("NormalizeImage", norm_type="mean_std"),  # an equivalent notation
        with_step("Resize", target_size=[640, 640]),  # the graph's input size has priority
    ],
)
def test_what_comes_to_the_same_is_taken(model, config, steps) -> None:
    describe(model, steps=steps)
    assert fit_reader(model, Reader.load(config)).notes == ()


def test_another_size_is_one_line(model, config) -> None:
    size = "EvalReader.sample_transforms.1.Resize.target_size=[64, 64]"
    assert "the reader resizes to 64 x 64" in refusal(model, config, size) and "32 x 32" in refusal(model, config, size)


def test_a_model_that_normalizes_is_fed_pixels(model, config, monkeypatch) -> None:
    describe(model, steps=[PREPROCESS[0], PREPROCESS[2]])
    monkeypatch.setattr("act_pipeline.data.model_fit.read_detector_graph", lambda model: DetectorGraph(normalizes=True))
    fit = fit_reader(model, Reader.load(config))
    assert len(fit.notes) == 1 and "NormalizeImage is left out, since the graph normalizes" in fit.notes[0]
    image = next(iter(fit.reader.loader("eval")))["image"]
    assert image.dtype == np.float32 and image.max() == 255
    model.infer_cfg_path.unlink()
    assert len(fit_reader(model, Reader.load(config)).notes) == 1


def test_the_reader_of_an_imported_model_that_normalizes_is_left_as_it_is(model, config, monkeypatch) -> None:
    """It may take pixels of 0 to 1 and subtract its own mean: without the reader's NormalizeImage it would get 0 to 255."""
    describe(model)
    monkeypatch.setattr("act_pipeline.data.model_fit.read_detector_graph", lambda model: DetectorGraph(normalizes=True))
    fit = fit_reader(model, Reader.load(config))
    assert len(fit.notes) == 1 and "if the model takes pixels of 0 to 255, delete NormalizeImage" in fit.notes[0]
    assert next(iter(fit.reader.loader("eval")))["image"].max() < 10


LETTERBOX = (
    "EvalReader.sample_transforms=[{Decode: {}}, {Resize: {target_size: [32, 32], keep_ratio: True, interp: 2}}, "
    "{Pad: {size: [32, 32], pad_mode: %d}}, {NormalizeImage: {mean: [0, 0, 0], std: [1, 1, 1], norm_type: none}}, "
    "{Permute: {}}]"
)


def test_a_letterbox_needs_a_graph_that_knows_of_it(model, config, monkeypatch) -> None:
    message = refusal(model, config, LETTERBOX % 0)
    assert "decodes boxes as if pictures were not padded" in message and "bbox_decode_type=pad" in message
    monkeypatch.setattr(
        "act_pipeline.data.model_fit.read_detector_graph", lambda model: DetectorGraph(decodes_padding=True)
    )
    fit_reader(model, Reader.load(config, [LETTERBOX % 0]))
    assert "Pad moves the picture on its canvas" in refusal(model, config, LETTERBOX % 1)
    described = [{**PREPROCESS[0], "keep_ratio": True}, {"type": "Pad", "size": [32, 32], "fill_value": [0, 0, 0]}]
    describe(model, steps=[*described, *PREPROCESS[1:]])
    assert "Pad has fill_value: (127.5, 127.5, 127.5), but" in refusal(model, config, LETTERBOX % 0)


# --- the commands ----------------------------------------------------------------------------------------------------

COMPRESS = """
Global: {{reader_config: {reader}, include_nms: true, Evaluation: true, model_dir: {model},
  model_filename: model.pdmodel, params_filename: model.pdiparams}}
Strategy: {{name: ptq}}
QuantPost: {{calib_images: 2, quantize_op_types: [conv2d]}}
"""


def compression(model: InferenceModel, reader: Path):
    path = reader.parent / "compress.yml"
    path.write_text(COMPRESS.format(reader=reader, model=model.directory))
    return load_config(path)


def run_compress(model, reader) -> None:
    from act_pipeline.compress import compress

    compress(compression(model, reader), reader.parent / "int8", device="CPU", progress=False)


def run_analyze(model, reader) -> None:
    from act_pipeline.analysis.analyze import analyze

    analyze(compression(model, reader), reader.parent / "analysis", device="CPU", progress=False)


def run_benchmark_command(model, reader) -> None:
    from act_pipeline.benchmark.plan import BenchmarkRequest
    from act_pipeline.benchmark.run import run_benchmark

    run_benchmark(BenchmarkRequest(model_path=str(model.directory), reader_config=str(reader)), say=lambda line: None)


@pytest.mark.parametrize("command", [run_compress, run_analyze, map_of, run_benchmark_command])
def test_every_command_asks(model, config, command) -> None:
    describe(model, ["disc", "square"], with_step("Resize", keep_ratio=True))
    with pytest.raises(UserError, match="keep_ratio: False, but the model was exported with keep_ratio: True"):
        command(model, config)


def test_a_float_model_that_finds_nothing_is_refused(model, config) -> None:
    describe(model, ["square", "disc"])
    with pytest.raises(UserError, match=r"model has 0\.0000 mAP on 12 images with 24 boxes .*no accuracy to keep"):
        run_compress(model, config)
    assert not (config.parent / "int8").exists()


def test_a_few_images_refuse_nothing(model, config) -> None:
    from types import SimpleNamespace

    from act_pipeline.compress.judging.float_checks import check_worth

    reader = Reader.load(config)
    compressed = compression(model, config)
    check_worth(compressed, SimpleNamespace(map=0.0, images=4, has_map=True), reader)
    check_worth(compressed, SimpleNamespace(map=0.02, images=24, has_map=True), reader)
    with pytest.raises(UserError):
        check_worth(compressed, SimpleNamespace(map=0.0, images=24, has_map=True), reader)


# --- a real RT-DETR --------------------------------------------------------------------------------------------------


def bccd_reader(folder: Path, arrange=lambda content: None, **options: Any) -> Path:
    """Write a reader for the first eight test images, with annotations modified by ``arrange``."""
    content = json.loads((BCCD_DATA / "annotations" / "instances_test.json").read_text())
    content["images"] = content["images"][:8]
    taken = {image["id"] for image in content["images"]}
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in taken]
    arrange(content)
    (folder / "eight.json").write_text(json.dumps(content))
    return write_reader(folder / "reader.yml", BCCD_DATA, folder / "eight.json", 256, **options)


def reverse(content: dict[str, Any]) -> None:
    content["categories"].reverse()


def add_root(content: dict[str, Any]) -> None:
    content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})


@needs_bccd
@pytest.mark.parametrize("arrange", [reverse, add_root])
def test_blood_cells_whatever_the_categories(tmp_path, arrange) -> None:
    found = map_of(InferenceModel.load(BCCD), bccd_reader(tmp_path, arrange))
    assert found == pytest.approx(BCCD_FIRST_EIGHT, abs=0.002)


@needs_bccd
def test_the_graph_of_blood_cells(tmp_path) -> None:
    from act_pipeline.graph.detector_graph import read_detector_graph

    for folder in (BCCD, SHARED / "models" / "bccd_int8_stock"):
        assert read_detector_graph(InferenceModel.load(folder)) == DetectorGraph(3, False, False)


@needs_bccd
def test_blood_cells_in_a_letterbox_and_normalized_in_the_graph(tmp_path) -> None:
    """0.4523 is the mAP of PaddleDetection's develop branch with these weights and `bbox_decode_type: pad`."""
    from act_pipeline.export import export_model

    weights = [f"weights={BCCD / 'rtdetr_hgnetv2_s_bccd.pdparams'}", "trt=True"]
    yml = BCCD / "rtdetr_hgnetv2_s_bccd.yml"
    letterbox = bccd_reader(tmp_path, keep_ratio=True, pad="{size: [256, 256], fill_value: [0., 0., 0.]}")
    padded = export_model(yml, tmp_path / "pad", [*weights, "DETRPostProcess.bbox_decode_type=pad"])
    assert map_of(padded, letterbox) == pytest.approx(0.4523, abs=0.002)
    with pytest.raises(UserError, match="keep_ratio: True, but"):
        map_of(InferenceModel.load(BCCD), letterbox)
    fused = export_model(yml, tmp_path / "fuse", [*weights, "TestReader.fuse_normalize=true"])
    said: list[str] = []
    assert map_of(fused, bccd_reader(tmp_path), said.append) == pytest.approx(BCCD_FIRST_EIGHT, abs=0.002)
    assert sum("NormalizeImage is left out" in line for line in said) == 1


def test_a_misspelt_transform_is_what_is_named(tmp_path: Path) -> None:
    config = write_reader(tmp_path / "reader.yml", make_tiny_data(tmp_path / "data", 24).parent)
    config.write_text(config.read_text().replace("Resize:", "Resise:"))
    with pytest.raises(UserError, match="Resise, which is no transform of ppdet.*did you mean 'Resize'"):
        Reader.load(config).input_size
