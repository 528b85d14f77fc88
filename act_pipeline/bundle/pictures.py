"""Pictures of a bundle, and what the model detects in them here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import create_engine
from act_pipeline.evaluation.matching import MIN_SCORE

ENGINE = "openvino"
PICTURES = 3
_LOOKED_AT = 50
# Weaker detections are no partners of the sure ones, whose scores another runtime changes by less.
_KEPT_SCORE = 0.05


@dataclass(frozen=True)
class Expected:
    """Pictures with detections.

    Attributes:
        record: content of ``expected.json``: the engine, and of each picture its file in the bundle and its detections
            (class, score, x1, y1, x2, y2 in pixels), the best first.
        files: source, and path in the bundle, of each picture.
    """

    record: dict[str, Any]
    files: tuple[tuple[Path, str], ...]


def expected_detections(model: InferenceModel, quantized: bool, reader: Any, pictures: Sequence[str] = ()) -> Expected:
    """Detect in pictures with OpenVINO on this machine.

    Args:
        model: the model.
        quantized: whether it is an INT8 model.
        reader: its preprocessing.
        pictures: picture files; empty: the first three of the reader's eval split that have a sure detection.

    Raises:
        UserError: a picture cannot be read, or there is no picture with a sure detection.
    """
    precision = "int8" if quantized else "fp32"
    engine = create_engine(ENGINE, model, precision)
    candidates = [Path(path) for path in pictures]
    if not candidates:
        candidates = [Path(record.file) for record in reader.dataset("eval").records[:_LOOKED_AT]]
    entries: list[dict[str, Any]] = []
    files: list[tuple[Path, str]] = []
    with contextlib.closing(engine):
        for path in candidates:
            if not pictures and len(files) == PICTURES:
                break
            rows = engine.run(reader.preprocess(path))["bbox"]
            rows = rows[(-rows[:, 1]).argsort(kind="stable")]
            sure = bool(len(rows)) and rows[0, 1] >= MIN_SCORE
            if not sure and not pictures:
                continue
            name = f"pictures/{len(files) + 1}{path.suffix.lower()}"
            kept = rows[rows[:, 1] >= _KEPT_SCORE]
            entries.append({"file": name, "detections": [[round(float(value), 5) for value in row] for row in kept]})
            files.append((path, name))
        versions = engine.versions()
    if not any(entry["detections"] and entry["detections"][0][1] >= MIN_SCORE for entry in entries):
        raise UserError(
            f"{model.directory} detects nothing with a score of {MIN_SCORE} in {len(candidates)} pictures, expected at "
            "least one object, to compare the target machine with; give pictures of what it was trained on with "
            "--pictures or --reader_config"
        )
    record = {"engine": f"{ENGINE} {versions.get(ENGINE, '')}".strip(), "precision": precision, "pictures": entries}
    return Expected(record, tuple(files))
