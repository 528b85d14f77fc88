"""What the float model detects, kept from run to run: the same model on the same data gives it again.

A compression is tried many times over with other settings; on COCO the float model's part of each is minutes. What is
kept lies in the user's cache (`cache_dir.cache_directory`), under the hash of all that decides it, and is whole:
scores, latencies and every detection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.cache_dir import cache_directory
from act_pipeline.core.records import versions, write_bytes_atomically
from act_pipeline.evaluation import Evaluation

BASELINE_SCHEMA = "act_pipeline.baseline/2"
FOLDER = "evaluations"
# Each is some megabytes on COCO; the oldest go.
KEPT = 16
_DECISIVE_PACKAGES = (
    "act_pipeline", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pycocotools", "paddledet", "openvino", "onnxruntime",
    "onnxruntime-gpu", "tensorrt",
)  # fmt: skip


def cached_evaluation(
    model_hash: str, data_hash: str, engine: str, device: str, threads: int, evaluate: Callable[[], Evaluation]
) -> tuple[Evaluation, bool]:
    """Return an evaluation from the cache, or make and keep it; a cache that cannot be written to is let be.

    Args:
        model_hash: of program and parameters (``InferenceModel.content_hash``).
        data_hash: of annotations, images and preprocessing (``Reader.fingerprint``).
        engine, device, threads: what runs the model; more threads add floats in another order.
        evaluate: makes the evaluation.

    Returns:
        the evaluation, and whether it was in the cache.
    """
    found = {name: version for name, version in versions().items() if name in _DECISIVE_PACKAGES}
    key = [BASELINE_SCHEMA, model_hash, data_hash, engine, device, threads, found]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_directory() / FOLDER / f"{name}.npz"
    kept = _read(path)
    if kept is not None:
        with contextlib.suppress(OSError):
            path.touch()  # the oldest by use go first
        return kept, True
    made = evaluate()
    with contextlib.suppress(OSError):
        write_bytes_atomically(path, _pack(made))
        _remove_oldest(path.parent)
    return made, False


def _pack(evaluation: Evaluation) -> bytes:
    figures = {
        field.name: getattr(evaluation, field.name)
        for field in dataclasses.fields(evaluation)
        if field.name not in ("detections", "matches")
    }
    text = json.dumps({"schema": BASELINE_SCHEMA, "evaluation": figures}).encode()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, record=np.frombuffer(text, np.uint8), detections=np.asfortranarray(evaluation.detections)
    )
    return buffer.getvalue()


def _read(path: Path) -> Evaluation | None:
    """Return what was kept; None if there is nothing, or nothing that can be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            record: dict[str, Any] = json.loads(content["record"].tobytes())
            detections = np.ascontiguousarray(content["detections"], np.float64)
        if record.get("schema") != BASELINE_SCHEMA or detections.ndim != 2 or detections.shape[1] != 7:
            return None
        return Evaluation(**record["evaluation"], detections=detections)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        file.unlink(missing_ok=True)
