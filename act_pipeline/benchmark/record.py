"""Results of a benchmark as a record and as text: rows, ratios, and remarks below the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.benchmark.plan import PADDLE_INFERENCE, BenchmarkRequest, Candidate, Models
from act_pipeline.benchmark.timing import latency, speed_ratio
from act_pipeline.benchmark.worker import UNTIMED_RUNS, Worker
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.package_versions import versions
from act_pipeline.engines import Machine


@dataclass
class Run:
    """A candidate and its measurements."""

    candidate: Candidate
    worker: Worker | None = None
    failure: str | None = None
    row: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    unsettled: int = 0

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def running(self) -> Worker:
        """Its process, once it was loaded and until it fails."""
        assert self.worker is not None, f"{self.label} was not loaded, or has failed"
        return self.worker

    def fail(self, reason: object) -> None:
        self.failure = str(reason)
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


def as_record(
    runs: Sequence[Run],
    models: Models,
    here: Machine,
    settings: Mapping[str, Any],
    reader: Any,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the content of ``benchmark.json``, with the rows that ran sorted by latency, then those that failed.

    Args:
        runs: the measurements.
        models: the compared models.
        here: the machine.
        settings: see :func:`run_settings`.
        reader: the reader; None if none was used.
        notes: notes for the user.
    """
    _fill_rows(runs, settings["batch_size"])
    return {
        "machine": _machine_record(here),
        "versions": _versions(runs),
        "settings": dict(settings),
        "models": {
            name: _model_record(model) for name, model in (("fp32", models.float_), ("int8", models.int8)) if model
        },
        "reader": str(reader.path) if reader is not None else None,
        "reader_hash": reader.fingerprint() if reader is not None else None,
        "notes": list(notes),
        "rows": sorted((run.row for run in runs), key=lambda row: (row["failure"] is not None, _p50(row))),
    }


def _fill_rows(runs: Sequence[Run], batch_size: int) -> None:
    """Fill in the rows: descriptions, percentiles and ratios."""
    measured = {run.label: run for run in runs if run.failure is None}
    paddle = [measured[f"{name} fp32"] for name in PADDLE_INFERENCE if f"{name} fp32" in measured]
    baseline = min(paddle, key=lambda run: float(np.median(run.seconds)), default=None)
    for run in runs:
        candidate, loaded = run.candidate, run.worker.loaded if run.worker is not None else {}
        timed = run.failure is None
        own = measured.get(f"{candidate.engine} fp32")
        run.row = {
            "label": run.label,
            "engine": candidate.engine,
            "precision": candidate.precision,
            "device": candidate.device,
            "failure": run.failure,
            "how": candidate.how,
            "threads": loaded.get("threads"),
            "settings": loaded.get("settings", {}),
            "artifact": loaded.get("artifact") or str(candidate.model.directory),
            "model_bytes": loaded.get("artifact_bytes") or candidate.model.bytes,
            "model_hash": loaded.get("artifact_hash") or candidate.model.content_hash(),
            "made_seconds": candidate.made_seconds,
            "latency_ms": latency(run.seconds) if timed else None,
            "device_latency_ms": latency([each / 1000 for each in run.device_ms]) if timed and run.device_ms else None,
            "images_per_second": round(batch_size * len(run.seconds) / sum(run.seconds), 3) if timed else None,
            "ratio_to_fp32": speed_ratio(own.seconds, run.seconds, own.label) if timed and own else None,
            "ratio_to_paddle_fp32": (
                speed_ratio(baseline.seconds, run.seconds, baseline.label) if timed and baseline else None
            ),
            "timings_ms": [round(seconds * 1000, 4) for seconds in run.seconds],
            "unsettled_runs": run.unsettled,
            "map": None,
            "map50": None,
            "images": None,
            "map_failure": None,
            "memory": None,
            "start_seconds": None,
            "first_start_seconds": None,
            **run.row,
        }


def heading(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    return (
        f"{record['machine']['cpu']}, {settings['threads']} threads, batch {settings['batch_size']}, "
        f"{settings['rounds']} rounds on {settings['input']}"
    )


def remarks(record: Mapping[str, Any]) -> list[str]:
    rows = record["rows"]
    lines = [f"failed: {row['label']}: {row['failure']}" for row in rows if row["failure"] is not None]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["map_failure"]:
            reasons.setdefault(row["map_failure"], []).append(row["label"])
    lines += [f"no mAP: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
    to_paddle = next((row["ratio_to_paddle_fp32"]["to"] for row in rows if row["ratio_to_paddle_fp32"]), None)
    if to_paddle is not None:
        lines.append(f"x Paddle: to {to_paddle}, the faster of Paddle Inference's own that ran")
    lines += [f"{row['label']}: made in {row['made_seconds']:.1f} s" for row in rows if row["made_seconds"] is not None]
    return [*lines, *record["notes"]]


def run_settings(
    request: BenchmarkRequest, threads: int, source: str, batches: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    return {
        "threads": threads,
        "batch_size": request.batch_size,
        "warmup": request.warmup,
        "rounds": request.rounds,
        "untimed_runs": UNTIMED_RUNS,
        "seed": request.seed,
        "input": source,
        "input_shape": list(batches["image"].shape[1:]),
        "limit": request.limit,
        "peer": request.peer,
        "peer_images": request.peer_images if request.peer else None,
        "peer_max_drop": request.peer_max_drop if request.peer == "nncf_accuracy_control" else None,
    }


def _machine_record(here: Machine) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(here).items() if key != "absent"}


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Return the versions reported by all engines that ran, and of this package."""
    found: dict[str, str] = {}
    for run in runs:
        if run.worker is not None:
            found.update(run.worker.versions())
    return {**found, **versions()}


def _model_record(model: InferenceModel) -> dict[str, Any]:
    return {"path": str(model.directory), "bytes": model.bytes, "hash": model.content_hash()}


def _p50(row: Mapping[str, Any]) -> float:
    return row["latency_ms"]["p50"] if row["latency_ms"] else 0.0
