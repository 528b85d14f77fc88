"""A change of the requests or of the load is told from a bad version, and no chance is taken for a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving_fixtures import BASELINE_IMAGES, Scene, audit_of, keep_detections, make_model

from act_pipeline.serving import Monitor, Repository, load_rules, promote
from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.detections import Seen
from act_pipeline.serving.temperature import NOT_AVAILABLE, Temperature
from act_pipeline.serving.window import Answer, Window

SCENE = Scene()
Detect = Callable[[int], np.ndarray]


def fewer(number: int) -> np.ndarray:
    """Six of ten objects are lost; the scores of the others are as usual."""
    rows = SCENE.int8_detections(number)
    return rows[np.random.default_rng([number, 4]).random(len(rows)) < 0.4]


def blind(number: int) -> np.ndarray:
    """Three of four pictures show nothing."""
    return SCENE.int8_detections(number) if number % 4 == 0 else np.zeros((0, 6))


class Service:
    """Versions 1, 2, ..., each with a share, and a monitor with the rules that are shipped."""

    def __init__(self, root: Path, *shares: int, float_model: Detect | None = None) -> None:
        self.repository, self.now, self.sent = Repository.open(root / "repository", create=True), 0.0, 0
        for number, share in enumerate(shares, start=1):
            model = make_model(root / str(number), str(number))
            keep_detections(model, [SCENE.int8_detections(10_000 + place) for place in range(BASELINE_IMAGES)])
            promote(self.repository, model, share, category_ids=[0, 1, 2])
        rules = load_rules(overrides=["shadow.share=30"])
        cool = Temperature(None, NOT_AVAILABLE)
        self.monitor = Monitor(self.repository, rules, float_model, lambda: cool, lambda: self.now)

    def serve(self, requests: int, detect: Callable[[int], Detect], seconds: Callable[[int], float] = lambda v: 0.03):
        for _ in range(requests):
            self.sent, self.now = self.sent + 1, self.now + 0.05
            name, inputs = f"r{self.sent}", self.sent
            version = self.monitor.route(name)
            assert version is not None
            self.monitor.answered(version, name, detect(version)(self.sent), seconds(version), inputs)
            self.monitor.drain_shadow()

    def by_rules(self) -> list[dict]:
        return [entry for entry in audit_of(self.repository.folder) if entry.get("by") == "rule"]

    @property
    def shares(self) -> dict[int, int]:
        return self.repository.state().shares()


@pytest.mark.parametrize("stream", [SCENE.dark, fewer, blind])
def test_a_changed_stream_takes_the_candidate_back_and_leaves_the_live_version(tmp_path: Path, stream: Detect) -> None:
    service = Service(tmp_path, 100, 100, 50)
    service.serve(900, lambda version: stream)
    (change,) = [entry for entry in service.by_rules() if entry["event"] != "alarm"]
    assert (change["event"], change["version"], change["cause"]) == ("roll_back", 3, "common")
    assert service.shares == {2: 100}, "version 1 would do no better on these pictures"
    told = next(entry for entry in service.by_rules() if entry.get("instead_of") == "roll_back")
    assert (told["version"], told["cause"]) == (2, "common") and "not this version's fault" in told["reason"]


@pytest.mark.parametrize("seed", range(3))
def test_a_candidate_that_loses_objects_is_taken_back(tmp_path: Path, seed: int) -> None:
    """Without a float model, and with scores as before, the number of objects alone tells."""
    service = Service(tmp_path, 100, 50)
    service.sent = 1000 * seed
    service.serve(500, lambda version: fewer if version == 2 else SCENE.int8_detections)
    (entry,) = [each for each in service.by_rules() if each["event"] != "alarm"]
    assert (entry["version"], entry["metric"], entry["cause"]) == (2, "detections_change", "version")
    assert service.shares == {1: 100}


@pytest.mark.parametrize("too", [True, False])
def test_without_another_version_the_float_model_tells(tmp_path: Path, too: bool) -> None:
    service = Service(tmp_path, 100, 100, float_model=fewer if too else SCENE.float_detections)
    service.serve(500, lambda version: fewer)
    causes = {(entry["event"], entry["metric"], entry["cause"]) for entry in service.by_rules()}
    if too:
        assert service.shares == {2: 100} and causes == {("alarm", "detections_change", "common")}
    else:
        assert service.shares == {1: 100} and ("roll_back", "disagreement", None) in causes


def test_a_slow_machine_leaves_the_live_version_and_a_slow_live_version_goes(tmp_path: Path) -> None:
    service = Service(tmp_path, 100, 100, 50)
    service.serve(500, lambda version: SCENE.int8_detections, lambda version: 0.8)
    assert service.shares == {2: 100} and service.by_rules()[0]["cause"] == "common"
    # Fast again, then slow with nothing that tells why: the version before is tried.
    service.serve(700, lambda version: SCENE.int8_detections)
    service.serve(300, lambda version: SCENE.int8_detections, lambda version: 0.8)
    assert service.shares == {1: 100} and service.by_rules()[-1]["cause"] is None


def objects(count: int) -> Seen:
    return Seen(np.zeros(count, np.int64), np.full(count, 0.9), np.full(count, 50.0))


def change_of(reference: Baseline, counts: list[int]) -> float | None:
    window = Window(1000, 1e9)
    for place, count in enumerate(counts):
        window.add(Answer(float(place), 0.1, objects(count)))
    return window.figures(float(len(counts)), reference).detections_change


def reference(counts: list[int]) -> Baseline:
    made = [objects(count) for count in counts]
    table = np.array([[0, 0.9, 0, 0, 50, 50]] * sum(counts), np.float64).reshape(-1, 6)
    empty = sum(not len(seen.scores) for seen in made)
    return Baseline.of(Seen.of(table), len(counts), empty, objects=np.array([c for c in counts if c]))


def test_what_chance_explains_is_no_change_of_the_number_of_objects() -> None:
    rare = reference([1] * 4 + [0] * 196)
    assert change_of(rare, [0] * 100) == 0, "two objects were to be expected, and none is no wonder"
    assert change_of(rare, [0] * 997 + [1] * 3) == 0
    crowds = reference([0] * 90 + [50] * 10)  # all objects come together
    assert crowds.spread == pytest.approx(15) and change_of(crowds, [0] * 98 + [50] * 2) == 0
    usual = reference([2, 3, 4] * 40)
    assert change_of(usual, [3] * 100) == 0
    assert change_of(usual, [1, 2] * 50) == pytest.approx(0.5) and change_of(usual, [0] * 100) == 1
    # A record of before the spread was kept.
    old = Baseline.from_json({name: value for name, value in usual.as_json().items() if name != "spread"})
    assert old.spread is None and old.variance == 3 and change_of(old, [1, 2] * 50) == pytest.approx(0.5)
    assert Baseline.from_json(usual.as_json()) == usual
