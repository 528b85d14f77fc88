"""``Strategy.min_agreement``: its definition, its errors, what it decides, and a compression on images without labels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from act_pipeline.compress import compress
from act_pipeline.compress.candidates import Candidate, Candidates
from act_pipeline.compress.result.summary import compression_table
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import BelowFloor, UserError
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.evaluation import (
    Agreement,
    AgreementLoss,
    Comparison,
    MapDifference,
    agreement_loss,
    detection_change,
    load_detections,
)
from act_pipeline.evaluation.agreement import ImageSums, image_sums
from act_pipeline.evaluation.certainty import certainty_lines

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "custom.yml"
FOLDER = """
{split}:
  !ImageFolder
    image_dir: {folder}
"""
TRANSFORMS = """
EvalReader:
  sample_transforms:
    - Decode: {}
    - Resize: {target_size: [224, 224], keep_ratio: False, interp: 2}
    - NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}
    - Permute: {}
"""


def rows(*boxes):
    """Return detections given as (image, x, y, width, height, score, class)."""
    return np.array(boxes, np.float64).reshape(-1, 7)


def test_an_object_counts_its_iou_times_the_ratio_of_the_scores_and_one_of_one_model_counts_0():
    reference = rows((0, 0, 0, 10, 10, 0.8, 1), (2, 0, 0, 10, 10, 0.9, 1))
    other = rows((0, 0, 0, 10, 9, 0.4, 1), (1, 0, 0, 5, 5, 0.5, 1), (2, 0, 0, 10, 10, 0.9, 2))
    sums = image_sums(reference, other, 4)
    np.testing.assert_allclose(sums.agreed, [0.9 * 0.5, 0, 0, 0])
    np.testing.assert_array_equal(sums.objects, [1, 1, 2, 0])
    found = agreement_loss(sums)
    assert found.agreement == pytest.approx(0.45 / 4) == pytest.approx(1 - detection_change(reference, other))
    assert agreement_loss(image_sums(reference, reference, 4)).agreement == 1
    assert agreement_loss(image_sums(rows(), rows(), 4)) is None


def test_the_interval_is_the_bootstrap_over_the_images():
    random = np.random.default_rng(3)
    objects = random.integers(0, 8, 60)
    sums = ImageSums(objects * random.uniform(0.7, 1, 60), objects)
    found, again = agreement_loss(sums), agreement_loss(sums)
    drawn = random.integers(0, 60, (4000, 60))
    expected = np.percentile(sums.agreed[drawn].sum(1) / objects[drawn].sum(1), [2.5, 97.5])
    np.testing.assert_allclose([1 + found.low, 1 + found.high], expected, atol=0.004)
    np.testing.assert_array_equal(found.samples, again.samples)
    middle = round(found.agreement, 3)
    assert found.probability(1 - middle) == pytest.approx(0.5, abs=0.1) and not found.tells(1 - middle)
    assert found.images_needed(1 - middle + 0.001) > 60


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["Strategy.min_agreement=1.5"], "min_agreement is the number 1.5, expected a number at least 0 and at most 1"),
        (["Strategy.min_agreement=-0.1"], "Strategy.min_agreement is the number -0.1"),
        (["Strategy.min_agreement=high"], "Strategy.min_agreement is the text 'high', expected a number"),
        (["Strategy={name: ptq, min_agreement: 0.9}", "Global.Evaluation=false"], "is 0.9, but Global.Evaluation is f"),
        (["Global.Evaluation=agreement"], "Strategy.min_agreement is missing, expected a number from 0 to 1"),
        (["Global.Evaluation=agreemnt"], "expected true or false or one of agreement; did you mean 'agreement'?"),
    ],
)
def test_a_bad_setting_is_one_line(overrides, words):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_that_are_enough():
    for overrides in (
        ["Strategy.max_drop=null"],
        ["Strategy.min_agreement=0.9", "Strategy.max_drop=null"],
        ["Strategy.min_agreement=0.9", "Global.Evaluation=agreement"],
        ["Strategy={name: ptq, max_drop: null}"],
        ["Strategy.name=ptq", "Global.Evaluation=agreement"],
    ):
        load_config(CONFIG, overrides)


def tried(max_drop=None, min_agreement=None, confidence=0.5, fp32=0.5) -> Candidates:
    strategy = SimpleNamespace(max_drop=max_drop, min_agreement=min_agreement, confidence=confidence)
    return Candidates(strategy, None, None, SimpleNamespace(map=fp32), progress=False)


def candidate(agreements, map_=0.497) -> Candidate:
    """Return a candidate with an mAP and resampled agreements, whose mean is the measured one."""
    samples = np.asarray(agreements, float) - 1
    low, high = np.percentile(samples, [2.5, 97.5])
    loss = AgreementLoss(float(samples.mean()), low, high, float(samples.std(ddof=1)), len(samples), 50, samples)
    drop = map_ - 0.5
    change = MapDifference(drop, drop, drop, 0.0, 2, 50, np.array([drop, drop])) if map_ >= 0 else None
    made = Candidate("ptq:mse", "ptq", None, None, None, None)
    made.evaluation = SimpleNamespace(map=map_)
    made.comparison = Comparison(change, Agreement(9, 1.0, 0.9, 0.1), 50, loss)
    return made


def test_the_measured_agreement_decides_and_exactly_the_limit_is_enough():
    found = candidate([0.85, 0.95, 0.9])
    assert tried(min_agreement=0.9).meets(found) and not tried(min_agreement=0.9001).meets(found)
    assert tried().meets(found) and tried(min_agreement=0.0).meets(found)


@pytest.mark.parametrize(("confidence", "meets"), [(0.25, True), (0.75, True), (0.76, False)])
def test_the_agreement_must_be_as_sure_as_asked(confidence, meets):
    assert tried(min_agreement=0.9, confidence=confidence).meets(candidate([0.91, 0.92, 0.93, 0.5])) is meets


def test_with_both_limits_both_must_hold():
    both = tried(0.005, 0.9)
    assert both.meets(candidate([0.9, 0.92])) and both.limits == "max_drop 0.005 and min_agreement 0.9"
    assert not both.meets(candidate([0.8, 0.9])) and not both.meets(candidate([0.99, 0.99], 0.49))


def test_without_labels_the_agreement_ranks_and_max_drop_has_no_effect():
    found = tried(0.005, 0.9, fp32=-1.0)
    low, high = candidate([0.6, 0.7], -1.0), candidate([0.8, 0.85], -1.0)
    assert found.max_drop is None and not found.has_map and found.limits == "min_agreement 0.9"
    found._added += [low, high]
    assert found.best() is high and not found.meets(high)
    assert found.gains(high, low, 0.1) and not found.gains(low, high, 0.1)


def test_with_both_limits_the_best_is_nearest_to_them():
    found = tried(0.005, 0.9)
    sharp, agreeing = candidate([0.7, 0.8], 0.51), candidate([0.88, 0.89], 0.498)
    found._added += [sharp, agreeing]
    assert found.best() is agreeing and found.gains(agreeing, sharp, 0.1)
    alone = tried(0.005)
    alone._added += [sharp, agreeing]
    assert alone.best() is sharp


def test_the_lines_give_the_agreement_and_what_the_images_decide():
    spread = candidate(np.linspace(0.85, 0.95, 1001), -1.0).comparison
    line, _ = certainty_lines(spread.figures(None, 0.92), None, 50, 0.92)
    assert line.startswith("agreement with FP32: 0.9000, 95% interval: 0.8525 to 0.9475 (1,001 resamples")
    assert "min_agreement 0.92 is inside it, so 50 images cannot tell whether INT8 has it, some " in line
    assert "probability of at least 0.92: 30." in line
    assert "all of it is at least min_agreement 0.8 (" in certainty_lines(spread.figures(None, 0.8), None, 50, 0.8)[0]
    assert "all of it is below min_agreement 0.96 (" in certainty_lines(spread.figures(None, 0.96), None, 50, 0.96)[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 photographs and a reader of them, without any label."""
    root = tmp_path_factory.mktemp("photos")
    make_sample(root / "data", 12, 12, seed=0, size=256)
    (root / "data" / "annotations" / "instances_train.json").unlink()
    text = FOLDER.format(split="TrainDataset", folder=root / "data" / "images" / "train")
    text += FOLDER.format(split="EvalDataset", folder=root / "data" / "images" / "val") + TRANSFORMS
    (root / "reader.yml").write_text(text)
    return root


def settings(photos: Path, model: InferenceModel, *overrides: str) -> list[str]:
    places = [f"Global.reader_config={photos / 'reader.yml'}", f"Global.model_dir={model.directory}"]
    return [*places, "QuantPost.calib_images=8", *overrides]


@pytest.fixture(scope="module")
def unlabelled(photos: Path, sample_model: InferenceModel):
    """The sample's model compressed by ``auto`` on the photographs."""
    config = load_config(CONFIG, settings(photos, sample_model, "Strategy={name: auto, min_agreement: 0.5}"))
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr("act_pipeline.calibration.feeds.HELD_OUT_IMAGES", 2)
        return compress(config, photos / "int8", "cpu", progress=False, report="en")


def test_photographs_without_labels_give_a_verdict(unlabelled, photos: Path):
    record = json.loads((photos / "int8" / "act.json").read_text())
    assert record["max_drop"] is None and record["min_agreement"] == 0.5 and record["confidence"] == 0.5
    assert record["map_drop"] is None and record["map_drop_interval"] is None and record["reference"] is None
    for name in ("fp32", "int8"):
        assert record[name]["map"] is None and record[name]["map50"] is None and record[name]["stats"] is None
        assert record[name]["bytes"] > 0
    assert record["evaluation"]["images"] == 12 and record["latency"]["ratio"] > 0
    agreed = record["agreement_interval"]
    assert 0.5 <= agreed["low"] <= agreed["value"] <= agreed["high"] < 1 and agreed["resamples"] == 1000
    assert record["agreement"]["boxes"] > 12 and record["probability_of_min_agreement"] == 1.0
    kept = load_detections(photos / "int8" / "detections.npz")
    assert agreed["value"] == pytest.approx(1 - detection_change(kept.rows["fp32"], kept.rows["int8"]), abs=1e-4)
    (step,) = record["steps"]
    assert step["name"].startswith("ptq:") and step["meets_max_drop"] and step["map"] is None
    table = compression_table(record)
    header = table.splitlines()[0].split()
    assert "agreement" in header and "mAP" not in header and f"{agreed['value']:.4f}, " in table
    assert "* kept, at min_agreement 0.5; 12 images" in table and "all of it is at least min_agreement 0.5" in table


def test_the_report_says_so_without_map(unlabelled, photos: Path):
    page = (photos / "int8" / "report.html").read_text()
    assert "INT8 holds: its detections agree with those of FP32 by" in page and "The images have no labels." in page
    verdict = json.loads((photos / "int8" / "report.json").read_text())["verdict"]
    assert (verdict["state"], verdict["by"], verdict["map_int8"]) == ("holds", "agreement", None)


def test_ops_are_reverted_until_the_agreement_is_reached(
    unlabelled, photos: Path, sample_model: InferenceModel, monkeypatch: pytest.MonkeyPatch
):
    """The second of two convolutions has to stay in INT8: a limit between the two models needs one of them in float."""
    monkeypatch.setattr("act_pipeline.compress.accuracy_control.ranker.RANK_IMAGES", 1)
    monkeypatch.setattr("act_pipeline.calibration.feeds.HELD_OUT_IMAGES", 2)
    two = "quantize.include=['backbone.conv2d_0', 'backbone.conv2d_1']"
    overrides = settings(photos, sample_model, two, "Strategy={name: ptq, min_agreement: 1.0}")
    with pytest.raises(
        BelowFloor, match=r"no INT8 model is at min_agreement 1.0 with the float model: the best, "
    ) as said:
        compress(load_config(CONFIG, overrides), photos / "two", "cpu", progress=False)
    assert "lower Strategy.min_agreement" in str(said.value) and "max_drop " not in str(said.value)
    below = json.loads((photos / "two.below_max_drop" / "act.json").read_text())
    first, second = (step["agreement_interval"]["value"] for step in below["steps"])
    assert below["agreement_interval"]["value"] == max(first, second) and below["int8"]["map"] is None
    assert not any(step["meets_max_drop"] for step in below["steps"])
    assert first != second and ("reverted to float for min_agreement 1.0" in json.dumps(below)) == (second > first)


def test_auto_without_labels_needs_min_agreement(photos: Path, sample_model: InferenceModel):
    config = load_config(CONFIG, settings(photos, sample_model))
    with pytest.raises(UserError, match="min_agreement is missing, .* has no labels, so there is no mAP for max_drop"):
        compress(config, photos / "none", "cpu", progress=False)


def test_a_reader_gives_a_folder_of_images_as_annotations_without_boxes(photos: Path):
    reader = Reader.load(photos / "reader.yml", ["num_classes=3"])
    found = reader.annotations("eval")
    assert not reader.labelled("eval") and found.boxes is None and len(found.images) == 12
    assert found.category_ids == [0, 1, 2] == reader.class_ids(found)
    assert [record.image_id for record in reader.dataset("eval").records] == [entry["id"] for entry in found.images]
    assert reader.fingerprint("train") != reader.fingerprint("eval")
    with pytest.raises(
        UserError, match="EvalDataset has no labels, expected a !COCODataSet with anno_path for the mAP"
    ):
        reader.require_labels("eval", "the mAP")
    with pytest.raises(UserError, match="EvalDataset has no labels, and neither the model nor .* expected num_classes"):
        Reader.load(photos / "reader.yml").annotations("eval")


def test_labels_can_be_left_unused(photos: Path):
    data = photos / "data"
    text = f"EvalDataset: !COCODataSet {{image_dir: images/val, anno_path: annotations/instances_val.json, dataset_dir: {data}}}"
    (photos / "labelled.yml").write_text(text + TRANSFORMS)
    reader = Reader.load(photos / "labelled.yml")
    without = reader.without_labels()
    assert (
        reader.labelled() and not without.labelled() and reader.annotations().boxes and not without.annotations().boxes
    )
    assert without.fingerprint() != reader.fingerprint()
    assert without.annotations().images == reader.annotations().images
