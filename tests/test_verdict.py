"""Confidence of a verdict: the configured value, acceptance of a model, and the statements in tables and records."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from act_pipeline.compress.candidates import Candidate, Candidates
from act_pipeline.config import load_config
from act_pipeline.core.errors import UserError
from act_pipeline.core.tables import agreement_line, certainty_lines, compression_table, images_tell, rounded_up
from act_pipeline.evaluation import Agreement, Comparison, MapDifference

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
    strategy = SimpleNamespace(max_drop=max_drop, confidence=confidence)
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


def test_what_a_record_says():
    told = comparison([-0.002, -0.001, 0.0]).as_record(0.005)
    assert told["map_drop_interval"]["low"] == pytest.approx(-0.0, abs=1e-4)
    assert told["map_drop_interval"]["high"] == pytest.approx(0.00195)
    assert (told["map_drop_interval"]["level"], told["map_drop_interval"]["resamples"]) == (0.95, 3)
    assert told["probability_within_max_drop"] == 1.0 and told["images_needed"] is None
    assert told["agreement"] == {"boxes": 1415, "matched": 0.999, "mean_iou": 0.981, "mean_score_change": 0.0204}
    unsure = comparison([-0.008, -0.003, 0.001]).as_record(0.005)
    assert unsure["probability_within_max_drop"] == pytest.approx(2 / 3) and unsure["images_needed"] > 50
    unlimited = comparison([-0.008, -0.003, 0.001]).as_record(None)
    assert unlimited["probability_within_max_drop"] is None and unlimited["images_needed"] is None
    assert unlimited["map_drop_interval"] == unsure["map_drop_interval"]


def test_tables_say_what_the_images_can_tell():
    unsure = comparison(np.linspace(-0.0125, 0.0065, 1001)).as_record(0.005)
    (line, agreed) = certainty_lines(unsure, 0.005, 50)
    assert "of 1,001 data sets drawn from these images 95% have a change of -0.0120 to +0.0060" in line
    assert "60.5% a drop of at most 0.005: 50 images cannot tell whether INT8 is within it, some " in line
    assert line.endswith(f"some {rounded_up(unsure['images_needed']):,} could")
    assert "1,415 boxes" in agreed and "99.9%" in agreed and "0.9810" in agreed and "0.0204" in agreed
    sure = comparison(np.linspace(-0.003, 0.001, 1001)).as_record(0.005)
    assert "cannot tell" not in certainty_lines(sure, 0.005, 50)[0] and images_tell(sure, 0.005)
    assert not images_tell(unsure, 0.005) and images_tell(unsure, None) and images_tell({}, 0.005)
    assert certainty_lines({}, 0.005, 50) == []
    assert agreement_line({"boxes": 3, "matched": 0.0}).endswith("INT8 finds none")
    assert agreement_line({"boxes": 0, "matched": None}).endswith("there is nothing to compare")


@pytest.mark.parametrize(("count", "rounded"), [(7, 7), (99, 99), (101, 110), (1234, 1300), (41000, 41000)])
def test_an_estimate_has_two_digits(count, rounded):
    assert rounded_up(count) == rounded


def test_the_table_has_the_interval_beside_the_change():
    compared = comparison(np.linspace(-0.0065, 0.0045, 1001), -0.0011).as_record(0.005)
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
