"""Files of a repository of versions, as the commands and the monitor read them, and its file of rules."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from act_pipeline.serving import Monitor, Repository, Rules, Temperature, load_rules, roll_back
from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.detections import Seen
from act_pipeline.serving.repository import POINTER_SCHEMA
from act_pipeline.serving.version import VERSION_SCHEMA
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files, yaml_files

ROOT = Path(__file__).resolve().parents[3]
_ROWS = np.array([[0, 0.9, 10, 10, 40, 50], [1, 0.4, 0, 0, 9, 9], [1, 0.05, 0, 0, 9, 9]], np.float64)
_STATE = {"live": 2, "candidate": 3, "share": 10, "spare": 1, "previous": [1], "automatic": False, "change": 4}
_ENTRY = {"time": "2026-01-01T00:00:00.000+00:00", "event": "promote", "version": 3, **_STATE}
_POINTER = {"schema": POINTER_SCHEMA, **_STATE, "entry": _ENTRY}
_COUNTERS = {"schema": "act_pipeline.counters/1", "versions": {"2": {"requests": 7, "errors": 1}, "3": {"requests": 1}}}


def _version(number: int) -> dict[str, Any]:
    baseline = Baseline.of(Seen.of(_ROWS), 3, 1).as_json()
    return {
        "version": number, "source": "/models/a", "model_hash": f"sha256:{number:064}", "passed": True,
        "verdict": "within max_drop 0.005", "map": 0.5, "baseline": baseline, "float_model": None,
        "ranges": {"x": 0.001, "y": 0.0},
    }  # fmt: skip


def _make(folder: Path) -> Path:
    """Write a repository whose three versions are live, candidate and spare."""
    repository = folder / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    for number in (1, 2, 3):
        inside = repository / "versions" / str(number)
        inside.mkdir(parents=True)
        (inside / "version.json").write_text(json.dumps({"schema": VERSION_SCHEMA, **_version(number)}))
    (repository / "live.json").write_text(json.dumps(_POINTER))
    (repository / "audit.jsonl").write_text(json.dumps(_ENTRY | {"change": 3}) + "\n")
    (repository / "counters.json").write_text(json.dumps(_COUNTERS))
    return repository


def _use(repository: Path, rules: Rules, change: bool = False) -> None:
    """Serve a few requests, look at the figures, and list what happened; ``change``: roll back too."""
    opened = Repository.open(repository)
    clock = itertools.count(0.0, 0.5)
    monitor = Monitor(opened, rules, None, lambda: Temperature(90.0, "recorded"), lambda: next(clock))
    for number in range(8):
        version = monitor.route(f"r{number}")
        if version is not None:
            monitor.answered(version, f"r{number}", _ROWS, 0.03)
            monitor.post_labels(f"r{number}", np.array([[0, 10.0, 10, 40, 50]]))
    monitor.check()
    monitor.prometheus()
    json.dumps(monitor.figures(), allow_nan=False)
    monitor.close()
    if change:
        roll_back(opened)
    opened.audit.entries()


def _file(name: str, seeds: Sequence[Any], *inside: str) -> Target:
    rules = load_rules()

    def read(folder: Path, content: bytes) -> None:
        repository = _make(folder)
        repository.joinpath(*inside).write_bytes(content)
        _use(repository, rules, change=name in ("live.json", "audit.jsonl"))

    return Target(name, lambda folder: json_files(seeds), read)


def _read_rules(folder: Path, content: bytes) -> None:
    (folder / "rules.yml").write_bytes(content)
    rules = load_rules(folder / "rules.yml")
    _use(_make(folder), rules)


def _rules_files(folder: Path) -> st.SearchStrategy[bytes]:
    small = """\
window: {requests: 50, seconds: 60, check_every: 2, labelled: 10}
shadow: {share: 20, queue: 4}
seed: 3
rules:
  - {metric: p99_ms, above: 20, clear: 10, min_count: 2, checks: 1, action: roll_back}
  - {metric: temperature, above: 80, min_count: 1, action: switch_to_spare}
  - {metric: map, below: 0.1, min_count: 2}
"""
    return yaml_files([(ROOT / "configs" / "serving" / "rules.yml").read_text(encoding="utf-8"), small])


POINTER = _file("live.json", [_POINTER, {"schema": POINTER_SCHEMA, **_STATE}], "live.json")
VERSION = _file("version.json", [{"schema": VERSION_SCHEMA, **_version(2)}], "versions", "2", "version.json")
COUNTERS = _file("counters.json", [_COUNTERS], "counters.json")
AUDIT = _file("audit.jsonl", [_ENTRY], "audit.jsonl")
RULES = Target("rules", _rules_files, _read_rules)
