"""`infer_eval.py` on an INT8 model that has the float model's detections in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import TinyReader, make_tiny_data

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, write_record
from act_pipeline.evaluation import DETECTIONS_FILENAME, Evaluation, load_detections, save_detections
from act_pipeline.inference import InferenceRequest, run_inference
from act_pipeline.inference.float_comparison import against_float

IMAGES = 6


@pytest.fixture()
def reader(tmp_path) -> TinyReader:
    annotations = make_tiny_data(tmp_path / "data", images=IMAGES)
    return TinyReader(annotations, annotations.parent / "images")


@pytest.fixture()
def model(int8_model, reader, tmp_path) -> InferenceModel:
    """The INT8 model with detections of a float model that misses the last image's object and has scores 0.1 higher."""
    folder = Path(shutil.copytree(int8_model.directory, tmp_path / "model"))
    found = evaluate(InferenceModel(folder), reader).evaluation
    assert found.map == 1.0
    rows = found.detections[found.detections[:, 0] < IMAGES - 1] + [0, 0, 0, 0, 0, 0.1, 0]
    keep(folder, rows, found.image_ids)
    write_record(folder / ACT_FILENAME, ACT_SCHEMA, {"max_drop": 0.005})
    return InferenceModel(folder)


def keep(folder: Path, rows: np.ndarray, image_ids: list[int], suffix: str = ".png") -> None:
    names = {number: f"{number - 100}{suffix}" for number in image_ids}
    evaluation = Evaluation(0, 0, {}, [], {}, len(image_ids), 1, None, 0.0, rows, image_ids)
    save_detections(folder / DETECTIONS_FILENAME, {"fp32": evaluation}, names)


def evaluate(model: InferenceModel, reader: TinyReader, **changes):
    request = InferenceRequest(
        str(model.directory), device="CPU", precision="int8", cpu_threads=1, engine="paddle", **changes
    )
    return run_inference(request, reader=reader, say=lambda line: None)


def test_the_difference_is_printed_in_one_line_and_recorded(model, reader):
    outcome = evaluate(model, reader)
    (line,) = [line for line in outcome.lines if line.startswith("against FP32 on 6 images: mAP +0.1")]
    assert "95% of 1,000 resamples" in line and "5 detections" in line and "score of 0.1000" in line
    record = outcome.record
    # Five of six objects are detected: recalls up to 0.83.
    assert record["map_drop"] == pytest.approx(84 / 101 - 1) and record["compared_images"] == 6
    assert record["map_drop_interval"]["low"] < record["map_drop"] < record["map_drop_interval"]["high"] == 0.0
    assert record["probability_within_max_drop"] == 1.0 and record["images_needed"] is None
    assert record["agreement"]["boxes"] == 5 and record["agreement"]["mean_iou"] == pytest.approx(1)
    assert record["agreement"]["mean_score_change"] == pytest.approx(0.1)


def test_the_first_images_are_compared_with_the_same_of_the_float_model(model, reader):
    outcome = evaluate(model, reader, limit=2)
    assert outcome.record["compared_images"] == 2 and outcome.record["map_drop"] == 0.0
    assert outcome.record["agreement"]["boxes"] == 2


def test_a_float_model_that_was_judged_by_some_of_the_images_is_compared_on_these(model, reader):
    found = evaluate(model, reader).evaluation
    keep(model.directory, np.zeros((0, 7)), found.image_ids[1:3])
    record = evaluate(model, reader).record
    assert record["compared_images"] == 2 and record["map_drop"] == -1.0 and record["agreement"]["boxes"] == 0


@pytest.mark.parametrize("what", ["other names", "other ids"])
def test_other_images_are_not_compared(model, reader, what):
    ids = [100 + place + (3 if what == "other ids" else 0) for place in range(IMAGES)]
    keep(model.directory, np.zeros((0, 7)), ids, ".jpg" if what == "other names" else ".png")
    outcome = evaluate(model, reader)
    (line,) = [line for line in outcome.lines if "compared" in line]
    assert line.endswith("detections.npz is of other images") and outcome.evaluation.map == 1.0
    for key in ("compared_images", "map_drop", "map_drop_interval", "agreement"):
        assert outcome.record[key] is None


def test_a_damaged_file_costs_no_evaluation(model, reader):
    (model.directory / DETECTIONS_FILENAME).write_bytes(b"no zip")
    outcome = evaluate(model, reader)
    (line,) = [line for line in outcome.lines if line.startswith("not compared with the float model: ")]
    assert "holds no detections" in line and outcome.exit_code == 0 and outcome.record["map"] == 1.0


def test_without_the_file_nothing_is_said(model, reader):
    (model.directory / DETECTIONS_FILENAME).unlink()
    outcome = evaluate(model, reader)
    assert not any("compared" in line or "against" in line for line in outcome.lines)
    assert outcome.record["compared_images"] is None


def test_a_lowered_file_belongs_to_the_folder_above(model, reader, tmp_path):
    evaluation = evaluate(model, reader).evaluation
    (model.directory / "onnx").mkdir()
    for path, images in ((model.directory / "onnx" / "a.onnx", 6), (tmp_path / "a.onnx", None)):
        path.write_bytes(b"x")
        assert against_float(OnnxModel(path), evaluation, reader)[0]["compared_images"] == images
    assert len(load_detections(model.directory / DETECTIONS_FILENAME).image_ids) == 6
