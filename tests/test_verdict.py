"""Confidence of a verdict: the configured value, acceptance of a model, and the statements in tables and records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from act_pipeline.compress.candidates import Candidate, Candidates
from act_pipeline.compress.result.summary import compression_table
from act_pipeline.config import load_config
from act_pipeline.core.errors import UserError
from act_pipeline.evaluation import Agreement, Comparison, ComparisonFigures, MapDifference
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.certainty import agreement_line, certainty_lines, rounded_up
from act_pipeline.evaluation.result import EvalRecord
from act_pipeline.evaluation.table import evaluation_table

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "custom.yml"


def comparison(samples, difference=None) -> Comparison:
    samples = np.asarray(samples, float)
    low, high = np.percentile(samples, [2.5, 97.5])
    mean = float(samples.mean()) if difference is None else difference
    found = MapDifference(mean, low, high, float(samples.std(ddof=1)), len(samples), 50, samples)
    return Comparison(found, Agreement(1415, 0.999, 0.981, 0.0204), 50)


@pytest.mark.parametrize("value", ["0.9", "0.5", "0.001"])
def test_confidence_is_a_share(value):
    assert load_config(CONFIG, [f"Strategy.confidence={value}"]).strategy.confidence == float(value)
    assert load_config(CONFIG).strategy.confidence == 0.5


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "95", "high", "null", "true"])
def test_a_confidence_that_is_none_is_one_line(value):
    words = r"Strategy.confidence is .*, expected a number above 0 and below 1"
    with pytest.raises(UserError, match=words):
        load_config(CONFIG, [f"Strategy.confidence={value}"])


def tried(max_drop, confidence, fp32=0.5):
    strategy = SimpleNamespace(max_drop=max_drop, min_agreement=None, confidence=confidence)
    return Candidates(strategy, None, None, SimpleNamespace(map=fp32), progress=False)


def candidate(found, map_=0.497):
    made = Candidate("ptq:mse", "ptq", None, None, None, None)
    made.evaluation, made.comparison = SimpleNamespace(map=map_), found
    return made


@pytest.mark.parametrize(
    ("confidence", "meets"),
    [(0.5, True), (0.6, True), (0.75, True), (0.76, False), (0.9, False), (0.1, True)],
)
def test_a_drop_must_be_as_sure_as_asked(confidence, meets):
    """The measured drop is 0.003; three of the four resamples are within 0.005."""
    found = comparison([-0.001, -0.002, -0.005, -0.006])
    assert tried(0.005, confidence).meets(candidate(found)) is meets


def test_at_one_half_the_measured_drop_decides():
    """The resamples have no effect: exactly the rule without confidence."""
    most_lose, most_hold = comparison([-0.1, -0.1, -0.1]), comparison([0.0, 0.0, 0.0])
    assert tried(0.003, 0.5).meets(candidate(most_lose))
    assert not tried(0.003, 0.5).meets(candidate(most_hold, 0.4969))
    assert tried(0.003, 0.51).meets(candidate(most_hold, 0.4969)) and not tried(0.003, 0.51).meets(candidate(most_lose))


def test_without_a_limit_or_objects_nothing_is_asked():
    assert tried(None, 0.9).meets(candidate(comparison([-0.5, -0.4])))
    assert tried(0.005, 0.9).meets(candidate(Comparison(None, Agreement(0, None, None, None), 50)))


def test_each_step_of_a_compression_says_how_it_ended_and_what_comes_next(capsys):
    steps = tried(0.005, 0.5)
    steps._progress = True
    for name, map_ in (("ptq:mse", 0.49), ("ptq:avg", 0.497)):
        made = candidate(None, map_)
        made.name, made.model = name, SimpleNamespace(bytes=1)
        steps.add(made)
    steps.announce("something else")
    assert capsys.readouterr().err.splitlines() == [
        "ptq:mse: mAP 0.4900, drop 0.0100; not within max_drop 0.005",
        "ptq:avg: mAP 0.4970, drop 0.0030; within max_drop 0.005",
        "next: something else",
    ]


def test_what_a_record_says():
    told = comparison([-0.002, -0.001, 0.0]).figures(0.005).as_json()
    assert told["map_drop_interval"]["low"] == pytest.approx(-0.0, abs=1e-4)
    assert told["map_drop_interval"]["high"] == pytest.approx(0.00195)
    assert (told["map_drop_interval"]["level"], told["map_drop_interval"]["resamples"]) == (0.95, 3)
    assert told["probability_within_max_drop"] == 1.0 and told["images_needed"] is None
    assert told["agreement"] == {"boxes": 1415, "matched": 0.999, "mean_iou": 0.981, "mean_score_change": 0.0204}
    unsure = comparison([-0.008, -0.003, 0.001]).figures(0.005)
    assert unsure.probability_within_max_drop == pytest.approx(2 / 3) and unsure.images_needed > 50
    unlimited = comparison([-0.008, -0.003, 0.001]).figures(None)
    assert unlimited.probability_within_max_drop is None and unlimited.images_needed is None
    assert unlimited.map_drop_interval == unsure.map_drop_interval
    assert ComparisonFigures.from_json({**unsure.as_json(), "map": 0.5}) == unsure
    assert ComparisonFigures.from_json({}) == ComparisonFigures()


def test_lines_give_the_interval_its_verdict_and_the_probability_for_max_drop():
    unsure = comparison(np.linspace(-0.0125, 0.0065, 1001)).figures(0.005)
    (line, agreed) = certainty_lines(unsure, 0.005, 50)
    assert line == (
        "95% interval of the change: -0.0120 to +0.0060 (1,001 resamples of these images); max_drop 0.005 is inside "
        f"it, so 50 images cannot tell whether INT8 keeps it, some {rounded_up(unsure.images_needed):,} could "
        "(probability of a drop of at most 0.005: 60.5%)"
    )
    assert "1,415 detections" in agreed and "99.9%" in agreed and "0.9810" in agreed and "0.0204" in agreed
    (unlimited, _) = certainty_lines(comparison(np.linspace(-0.0125, 0.0065, 1001)).figures(None), None, 50)
    assert unlimited == "95% interval of the change: -0.0120 to +0.0060 (1,001 resamples of these images)"
    sure = comparison(np.linspace(-0.003, 0.001, 1001)).figures(0.005)
    assert "; all of it is within max_drop 0.005 (" in certainty_lines(sure, 0.005, 50)[0] and sure.decides(0.005)
    worse = comparison(np.linspace(-0.03, -0.01, 1001)).figures(0.005)
    assert "; all of it is beyond max_drop 0.005 (" in certainty_lines(worse, 0.005, 50)[0] and worse.decides(0.005)
    assert not unsure.decides(0.005) and unsure.decides(None) and ComparisonFigures().decides(0.005)
    assert certainty_lines(ComparisonFigures(), 0.005, 50) == []
    assert agreement_line(Agreement(3, 0.0, None, None)).endswith("INT8 finds none")
    assert agreement_line(Agreement(0, None, None, None)).endswith("there is nothing to compare")


@pytest.mark.parametrize(("count", "rounded"), [(7, 7), (99, 99), (101, 110), (1234, 1300), (41000, 41000)])
def test_an_estimate_has_two_digits(count, rounded):
    assert rounded_up(count) == rounded


def test_the_table_has_the_interval_beside_the_change():
    compared = comparison(np.linspace(-0.0065, 0.0045, 1001), -0.0011).figures(0.005).as_json()
    figures = {"map": 0.5, "map50": 0.7, "bytes": 4_000_000}
    step = {
        **figures,
        "name": "ptq:mse",
        "map_drop": 0.0011,
        "chosen": True,
        "quantized": 9,
        "seconds": 3.0,
        **compared,
    }
    record = {
        "fp32": {**figures, "bytes": 16_000_000}, "steps": [step], "quantizable_ops": 10, "given_back": [], "max_drop": 0.005,
        "evaluation": {"images": 50, "engine": "openvino", "device": "CPU"}, "seconds": {"calibrate": 3.0},
        "latency": None, "reference": None, **compared,
    }  # fmt: skip
    table = compression_table(record)
    assert "-0.0011, -0.006 to +0.004" in table and "50 images cannot tell" in table
    older = {**record, "steps": [{key: value for key, value in step.items() if key not in compared}]}
    for key in compared:
        older.pop(key)
    assert "-0.0011 " in compression_table(older) and "cannot tell" not in compression_table(older)


def test_a_record_is_written_as_it_was_read():
    interval = {"low": -0.01, "high": 0.02, "level": 0.95, "resamples": 10, "standard_error": 0.1}
    compared = {
        "map_drop_interval": interval, "probability_within_max_drop": 0.5, "images_needed": 7,
        "agreement": {"boxes": 3, "matched": 0.5, "mean_iou": 0.9, "mean_score_change": 0.1},
        "agreement_interval": {"low": 0.7, "high": 0.9, "level": 0.95, "resamples": 9, "standard_error": 0.1, "value": 0.8},
        "probability_of_min_agreement": 0.25, "agreement_images_needed": 70,
    }  # fmt: skip
    scores = {"stats": {"ap": 0.5}, "latency_ms": None, "images_per_second": 2.0}
    figures = {"map": 0.5, "map50": 0.7, "bytes": 16}
    model = {**figures, "stats": {"ap": 0.5}, "per_class": {"a": None}, "latency_ms": None, "images_per_second": 2.0}
    op = {"type": "conv2d", "output": "x", "module": "m", "group": "backbone"}
    record = {
        "strategy": "auto", "chosen": "ptq:mse", "max_drop": 0.005, "fp32": model, "int8": model, "confidence": 0.5,
        "min_agreement": 0.9, "map_drop": 0.1, **compared, "bytes_ratio": 0.25, "seconds": {"prepare": 1.0}, "quantizable_ops": 3,
        "quantized_ops": {"conv2d": 1}, "kept_ops": [{**op, "reason": "asked"}], "weight_only_ops": [],
        "given_back": [{**op, "sensitivity": 0.0, "map_after": 0.5}], "calibration": {"algo": "mse"},
        "steps": [{"name": "ptq:mse", "strategy": "ptq", "note": "", **figures, **scores, "map_drop": 0.1, **compared,
                   "quantized": 1, "kept": 2, "weight_only": 0, "seconds": 3.0, "meets_max_drop": True, "chosen": True}],
        "evaluation": {"engine": "openvino", "fp32_engine": "openvino", "why": "fastest", "fp32_cached": False,
                       "device": "CPU", "engines": 1, "threads": 2, "images": 50},
        "latency": {"rounds": 10, "fp32": {"p50_ms": 2.0, "p90_ms": 3.0}, "int8": {"p50_ms": 1.0, "p90_ms": 2.0}, "ratio": 2.0},
        "reference": {"engine": "int8_reference", "images": 5, "map": 0.5, "judged_map": 0.5,
                      "difference": {"low": -0.1, "high": 0.1}},
        "placement": {"verdict": "mixed", "line": "mixed: 2 of 3", "engine": "openvino", "ops": 3, "reverted": ["a", "b"],
                      "groups": {"g": 2}, "gains": {"g": 0.1, "h": -0.1}, "latency_ms": {"all": 3.0, "placed": 2.0},
                      "int8_gain": 0.5, "float_precision": "bf16", "measured": 2, "from_cache": 1,
                      "device": "Tesla T4", "batch": 8},
        "model_hash": "sha256:ab", "overrides": ["a.b=c"],
    }  # fmt: skip
    assert json.dumps(ActRecord.from_json(record).as_json()) == json.dumps(record)


def test_the_table_of_evaluations_names_the_file_that_it_counts():
    """An exported ONNX file and a Paddle folder are not of one format: no size ratio between them."""

    def record(artifact, size):
        scores = {"map": 0.5, "map50": 0.7, "latency_ms": {"p50": 2.0}}
        return EvalRecord("openvino", "int8", "CPU", **scores, model_bytes=size, artifact=artifact)

    table = evaluation_table(
        {
            "FP32": record("m/onnx/a.onnx", 8_000_000),
            "INT8": record("i/onnx/a.onnx", 2_000_000),
            "reference": record("i", 3_000_000),
        }
    )
    header, _, fp32, int8, reference = table.splitlines()
    assert "MB loaded" in header and "ONNX 8.00" in fp32
    assert "ONNX 2.00       0.250" in int8 and "Paddle 3.00           -" in reference
