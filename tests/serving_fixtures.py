"""Models without content, their records, and a fake detector whose answers are drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.records import ACT_SCHEMA, write_record
from act_pipeline.evaluation.act_candidates import ModelFigures, Step
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.act_measurements import EvaluatedIn
from act_pipeline.evaluation.comparison import ComparisonFigures
from act_pipeline.evaluation.detections_file import DETECTIONS_FILENAME
from act_pipeline.serving import Monitor, Repository

BASELINE_IMAGES = 100


def make_model(folder: Path, name: str = "a", meets: bool | None = True, **changes: Any) -> Path:
    """Write the folder of an INT8 model with its ``act.json``; the files are no program that a runtime could load."""
    folder.mkdir(parents=True)
    (folder / "model.pdmodel").write_text(f"program {name}")
    (folder / "model.pdiparams").write_text(f"parameters {name}")
    step = Step("ptq:mse", "ptq", "", ModelFigures(1, 0.5), 0.002, ComparisonFigures(), 1, 0, 0, 1.0, meets, True)
    record = ActRecord(
        strategy="ptq",
        chosen="ptq:mse",
        max_drop=0.005,
        int8=ModelFigures(1, 0.5),
        map_drop=0.002,
        steps=(step,),
        evaluation=EvaluatedIn(images=72),
        model_hash=InferenceModel.load(folder).content_hash(),
    ).as_json()
    write_record(folder / "act.json", ACT_SCHEMA, {**record, **changes})
    return folder


def keep_detections(model: Path, detections: list[np.ndarray], name: str = "int8") -> None:
    """Write ``detections.npz`` next to a model, with class indices as category ids."""
    rows = [
        np.column_stack([np.full(len(b), i), b[:, 2:4], b[:, 4:6], b[:, 1], b[:, 0]]).astype(np.float32)
        for i, b in enumerate(detections)
    ]
    ids = np.arange(len(detections))
    np.savez(
        model / DETECTIONS_FILENAME,
        image_ids=ids.astype(np.int64),
        image_names=ids.astype(np.uint32),
        **{name: np.concatenate(rows)},
    )


class Scene:
    """Pictures and what detectors find on them: each picture is its number, and a version is what it does to boxes."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def objects(self, number: int) -> np.ndarray:
        """Return the objects [G, 5] of a picture: class, x1, y1, x2, y2."""
        random = np.random.default_rng([self.seed, number])
        count = random.integers(4, 9)
        low, edges = random.uniform(0, 400, (count, 2)), random.uniform(20, 200, (count, 2))
        return np.column_stack([random.integers(0, 3, count), low, low + edges])

    def float_detections(self, number: int) -> np.ndarray:
        """Return the float model's detections [K, 6]: the objects, and some rows of low scores."""
        random = np.random.default_rng([self.seed, number, 1])
        objects = self.objects(number)
        scores = random.beta(6, 2, len(objects))
        noise = random.uniform(0, 400, (20, 2))
        low = np.column_stack([random.integers(0, 3, 20), random.uniform(0, 0.15, 20), noise, noise + 30])
        return np.concatenate([np.column_stack([objects[:, :1], scores, objects[:, 1:]]), low])

    def int8_detections(self, number: int, shift: float = 0.02, box: float = 1.0) -> np.ndarray:
        """Return an INT8 model's detections: scores and boxes moved a little (``box``: pixels)."""
        random = np.random.default_rng([self.seed, number, 2])
        rows = self.float_detections(number)
        rows[:, 1] = np.clip(rows[:, 1] + random.normal(0, shift, len(rows)), 0, 1)
        rows[:, 2:] += random.normal(0, box, (len(rows), 4))
        return rows

    def dark(self, number: int) -> np.ndarray:
        """Return the detections on a dark picture: half the scores, and a half of the objects is lost."""
        rows = self.int8_detections(number)
        random = np.random.default_rng([self.seed, number, 3])
        rows[:, 1] *= np.where(random.random(len(rows)) < 0.5, 0.5, 0.1)
        return rows


def serve_until_changed(
    monitor: Monitor, repository: Repository, requests: int, answer: Callable[[int, int], tuple[np.ndarray, float, Any]]
) -> int | None:
    """Answer requests until a rule takes the candidate back, and close the monitor.

    Args:
        monitor: the monitor.
        repository: its versions.
        requests: the most requests.
        answer: number and version of a request -> detections, seconds, and the inputs of the float model.

    Returns:
        the number of requests after which a rule changed the versions; None: none did.
    """
    try:
        for number in range(requests):
            version = monitor.route(f"r{number}")
            rows, seconds, inputs = answer(number, version)
            monitor.answered(version, f"r{number}", rows, seconds, inputs)
            monitor.drain_shadow()
            if repository.state().candidate is None:
                return number + 1
        return None
    finally:
        monitor.close()


def decision_of(repository: Repository) -> dict[str, Any]:
    """Return the first entry of the audit log by which a rule did more than raise an alarm."""
    entries = [entry for entry in audit_of(repository.folder) if entry.get("by") == "rule"]
    return next(entry for entry in entries if entry["event"] != "alarm")


def audit_of(repository: Path) -> list[dict[str, Any]]:
    """Return the lines of the log, each of which must be JSON."""
    return [json.loads(line) for line in (repository / "audit.jsonl").read_text().splitlines()]
