"""Result of a request, its lines and its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.records import write_record
from act_pipeline.evaluation import EVAL_SCHEMA, Evaluation
from act_pipeline.inference.request import InferenceRequest

Say = Callable[[str], None]


@dataclass
class InferenceOutcome:
    """Result of a request.

    Attributes:
        exit_code: 0, or that of the process started after shapes were collected.
        lines: the text to print.
        evaluation: result of an evaluation.
        record: content of the JSON file.
        detections: for an image: [K, 6] class index, score, x1, y1, x2, y2, those that reach the threshold.
        picture: the drawn file.
    """

    exit_code: int = 0
    lines: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None
    record: dict[str, Any] | None = None
    detections: np.ndarray | None = None
    picture: Path | None = None


def finished(request: InferenceRequest, outcome: InferenceOutcome) -> InferenceOutcome:
    """Write the record where the request names a file, and return the outcome with a line about it."""
    if request.json is None or outcome.record is None:
        return outcome
    write_record(request.json, EVAL_SCHEMA, outcome.record)
    return replace(outcome, lines=[*outcome.lines, f"record: {request.json}"])


def latency_line(latency_ms: Mapping[str, float], images_per_second: float, batch_size: int, requests: int = 1) -> str:
    """Return latencies in ms and the throughput in one line."""
    figures = ", ".join(f"{name} {latency_ms[name]:.2f}" for name in ("min", "p50", "p90", "p99", "max"))
    parallel = "" if requests == 1 else f", {requests} in parallel"
    return f"latency ms a batch of {batch_size}{parallel}: {figures}; {images_per_second:.2f} images/s"
