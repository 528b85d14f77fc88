"""The monitor: shares, figures, rules and what they do, with fake detectors; clocks and pictures are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from serving_fixtures import (
    BASELINE_IMAGES,
    Scene,
    audit_of,
    decision_of,
    keep_detections,
    make_model,
    serve_until_changed,
)

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import RANGES_FILENAME, RANGES_SCHEMA, write_record
from act_pipeline.serving import Monitor, RangeShares, Repository, State, Temperature, load_rules, promote
from act_pipeline.serving.breach import Breach, Figure
from act_pipeline.serving.metrics import METRICS, PREFIX
from act_pipeline.serving.routing import choose_version
from act_pipeline.serving.rules import Rule
from act_pipeline.serving.temperature import NOT_AVAILABLE, Sensor

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "serving"


class Service:
    """A server without a network: two versions, and what each does to a picture."""

    def __init__(self, root: Path, seed: int, sensor: Callable[[], Temperature], share: int = 50) -> None:
        self.scene, self.now = Scene(seed), 0.0
        self.repository = Repository.open(root / "repository", create=True)
        for name, part in (("a", 100), ("b", share)):
            model = make_model(root / name, name)
            keep_detections(model, [self.scene.int8_detections(10_000 + i) for i in range(BASELINE_IMAGES)])
            write_record(model / RANGES_FILENAME, RANGES_SCHEMA, {"images": 8, "shares": {"x": 0.001}})
            promote(self.repository, model, part, category_ids=[0, 1, 2])
        self.float_model = self.scene.float_detections
        rules = load_rules(overrides=["shadow.share=20"])
        self.monitor = Monitor(
            self.repository, rules, lambda number: self.float_model(number), sensor, lambda: self.now,
            range_probe=lambda number: RangeShares(("x",), np.array([0.001]), "a test"),
        )  # fmt: skip

    def serve(self, requests: int, new: Callable[[int], np.ndarray], new_s: float = 0.03, old=None) -> int | None:
        """Answer requests; returns the number after which a rule changed the versions, None if none did."""

        def answer(number: int, version: int) -> tuple[np.ndarray, float, int]:
            self.now += 0.05
            detect = new if version == 2 else (old or self.scene.int8_detections)
            return detect(number), new_s if version == 2 else 0.03, number

        return serve_until_changed(self.monitor, self.repository, requests, answer)

    def decision(self) -> dict:
        return decision_of(self.repository)


def cool() -> Temperature:
    return Temperature(50.0, "recorded")


def check_a_broken_int8_is_found(tmp_path: Path, seed: int) -> None:
    service = Service(tmp_path, seed, cool)
    found = service.serve(600, lambda number: service.scene.int8_detections(number, shift=0.25, box=25))
    assert found is not None and service.decision()["metric"] in ("disagreement", "psi")
    assert service.decision()["version"] == 2 and service.repository.state().shares() == {1: 100}


def check_a_dark_stream_is_found(tmp_path: Path, seed: int) -> None:
    service = Service(tmp_path, seed, cool)
    service.float_model = service.scene.dark
    found = service.serve(600, service.scene.dark, old=service.scene.dark)
    assert found is not None and service.decision()["metric"] == "psi" and service.decision()["value"] > 0.5
    assert service.decision()["others"]["1"] > 0.5  # the version before has it too: the stream is the cause


def check_a_slow_version_is_found(tmp_path: Path, seed: int) -> None:
    service = Service(tmp_path, seed, cool)
    found = service.serve(400, service.scene.int8_detections, new_s=0.8)
    assert found is not None and service.decision()["metric"] == "p99_ms"


def check_a_hot_device_is_found(tmp_path: Path, seed: int) -> None:
    readings = iter([60.0, 70.0, 80.0, *[90.0] * 1000])
    service = Service(tmp_path, seed, lambda: Temperature(next(readings), "recorded"))
    found = service.serve(200, service.scene.int8_detections)
    assert found is not None and service.decision()["metric"] == "temperature"


def check_a_healthy_version_stays(tmp_path: Path, seed: int) -> None:
    service = Service(tmp_path, seed, cool)
    assert service.serve(600, service.scene.int8_detections) is None
    assert not [entry for entry in audit_of(service.repository.folder) if entry.get("by") == "rule"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "check",
    [
        check_a_broken_int8_is_found,
        check_a_dark_stream_is_found,
        check_a_slow_version_is_found,
        check_a_hot_device_is_found,
    ],
)
def test_what_is_bad_is_rolled_back(check: Callable[[Path, int], None], seed: int, tmp_path: Path) -> None:
    check(tmp_path, seed)


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_version_stays(seed: int, tmp_path: Path) -> None:
    check_a_healthy_version_stays(tmp_path, seed)


def test_shares_are_kept_and_a_request_stays_with_its_version() -> None:
    ids = [f"request {number}" for number in range(20_000)]
    before: set[str] = set()
    for share in (1, 10, 50):
        state = State(live=1, candidate=2, share=share)
        chosen = {name for name in ids if choose_version(state, name) == 2}
        assert abs(len(chosen) / len(ids) * 100 - share) < 1.5 and before <= chosen
        before = chosen
    assert choose_version(State(), "x") is None


def test_a_rule_acts_after_its_checks_and_again_after_it_is_clear() -> None:
    breach = Breach(Rule("p99_ms", above=100, clear=80, min_count=10, checks=2))
    values = [(200, 5), (200, 20), (90, 20), (200, 20), (200, 20), (90, 20), (200, 20), (70, 20), (200, 20), (200, 20)]
    assert [breach.check(Figure(value, count)) for value, count in values] == [False] * 4 + [True] + [False] * 4 + [
        True
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rules.0.above=null", "rules.0..above and below are both given or both missing"),
        (
            "rules.0.clear=0.9",
            "rules.0..clear is 0.9, at which the rule .above 0.15. is broken, expected at most 0.15",
        ),
        ("rules.0.min_count=9999", "is 9999 .*, and disagreement is of the last 500 requests at most: it is never"),
        (
            "rules=[{metric: beyond_range, above: 2}]",
            r"rules.0..min_count is 100 \(100 if it is missing\), .* last 50 sh",
        ),
        ("rules.6.above=1.5", "rules.6..above is 1.5, expected 0 to 1, as error_rate is"),
        ("rules.6.above=1", "rules.6..above is 1, and error_rate is never above it, expected 0 to 1"),
        ("rules.6.clear=-0.1", "rules.6..clear is -0.1, expected 0 to 1"),
        ("rules.5.above=-1", "rules.5..above is -1, expected at least 0, as p99_ms is"),
        ("rules=[{metric: map, below: 0}]", "rules.0..below is 0, and map is never below it"),
        ("rules.0.above=.nan", "rules.0..above is .*nan.*, expected a finite number"),
        ("rules.0.above=.inf", "rules.0..above is .*inf.*, expected a finite number"),
        (
            "rules=[{metric: psi, above: 1}, {metric: p99_ms, above: 9}, {metric: psi, above: 2}]",
            "rules.2. is psi above 2, alarm; rules.0. is the same, above 1: remove one",
        ),
        ("rules.0.metric=pst", "rules.0..metric is the text 'pst', expected one of disagreement"),
        ("shadow.share=0", "needs shadow.share above 0"),
    ],
)
def test_a_wrong_rule_is_one_line(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_rules(overrides=[override])


def test_two_rules_of_one_figure_are_told_apart_in_the_metrics(tmp_path: Path) -> None:
    rules = load_rules(overrides=["rules=[{metric: psi, above: 1}, {metric: psi, above: 2, action: roll_back}]"])
    repository = Repository.open(tmp_path / "repository", create=True)
    promote(repository, make_model(tmp_path / "a", "a"), 100)
    lines = [
        line for line in Monitor(repository, rules, None, cool).prometheus().splitlines() if "rule_active{" in line
    ]
    assert len({line.split("}")[0] for line in lines}) == len(lines) == 2, lines


def test_temperatures_of_hwmon_of_zones_and_of_nothing(tmp_path: Path) -> None:
    assert Sensor(tmp_path, None)() == Temperature(None, NOT_AVAILABLE)
    zone = tmp_path / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("CPU-therm\n")
    (zone / "temp").write_text("61500\n")
    assert Sensor(tmp_path, None)() == Temperature(61.5, "thermal zone CPU-therm")
    for index, (name, value) in enumerate((("nvme", "80000"), ("coretemp", "45000"))):
        chip = tmp_path / "class" / "hwmon" / f"hwmon{index}"
        chip.mkdir(parents=True)
        (chip / "name").write_text(name)
        (chip / "temp1_input").write_text(value)
    assert Sensor(tmp_path, None)() == Temperature(45.0, "hwmon coretemp")


def parsed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Parse Prometheus' text format; every line must be of it, and every metric have its type before its values."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert kind in ("counter", "gauge") and name not in found
            found[name] = []
            continue
        name, labels, value = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z]+="[^"]*",?)+)\})? (\S+)', line).groups()
        found[name].append((dict(re.findall(r'([a-z]+)="([^"]*)"', labels or "")), float(value)))
    return found


def check_every_metric_is_there(tmp_path: Path) -> None:
    service = Service(tmp_path, 0, cool)
    for number in range(300):
        version = service.monitor.route(f"r{number}")
        service.now += 0.05
        rows = service.scene.int8_detections(number)
        service.monitor.answered(version, f"r{number}", rows, 0.03, number)
        service.monitor.drain_shadow()
        if number % 10 == 0:
            assert service.monitor.post_labels(f"r{number}", service.scene.objects(number))
    service.monitor.failed(1, "bad", 0.1)
    service.monitor.answered(1, "nan", np.full((1, 6), np.nan), 0.1)
    found = parsed(service.monitor.prometheus())
    assert set(found) == {PREFIX + name for name in METRICS}
    assert sum(value for _, value in found["act_pipeline_requests_total"]) == 302
    assert sum(value for _, value in found["act_pipeline_errors_total"]) == 2
    assert all(0.5 < value <= 1 for _, value in found["act_pipeline_map"])
    service.monitor.close()
    again = Monitor(service.repository, load_rules(), None, cool, lambda: 0.0)
    assert sum(part["counters"]["requests"] for part in again.figures()["versions"].values()) == 302


def test_every_metric_is_there_and_counters_go_on(tmp_path: Path) -> None:
    check_every_metric_is_there(tmp_path)


def test_alert_rules_and_the_dashboard_have_names_of_the_metrics() -> None:
    known = {PREFIX + name for name in METRICS}
    for name in ("prometheus_alerts.yml", "grafana.json"):
        text = (CONFIGS / name).read_text()
        assert yaml.safe_load(text)  # JSON is YAML
        used = set(re.findall(rf"{PREFIX}[a-z_]+", text))
        assert used and used <= known, used - known


def test_the_dashboard_has_the_figure_of_every_rule_and_panels_that_do_not_overlap() -> None:
    dashboard = json.loads((CONFIGS / "grafana.json").read_text(encoding="utf-8"))
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = {"p99_ms": "latency_seconds", "temperature": "temperature_celsius", "psi_worst_class": "psi_class"}
    for rule in load_rules().rules:
        assert PREFIX + names.get(rule.metric, rule.metric) in shown.split(), rule.metric
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_alerts_come_before_the_rules_act() -> None:
    text = (CONFIGS / "prometheus_alerts.yml").read_text()
    bounds = {rule.metric: rule.above for rule in load_rules().rules}
    found = {name: float(bound) for name, bound in re.findall(rf"expr: {PREFIX}([a-z_]+)\S* > ([\d.]+)$", text, re.M)}
    units = {"latency_seconds": ("p99_ms", 1000.0), "temperature_celsius": ("temperature", 1.0)}
    for name, bound in found.items():
        metric, factor = units.get(name, (name, 1.0))
        assert bound * factor < bounds[metric], name
    assert {"psi", "disagreement", "detections_change", "error_rate", *units} <= set(found)
