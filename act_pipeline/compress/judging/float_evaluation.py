"""Cache of the float model's evaluation across runs.

A compression is usually repeated with other settings, and on COCO the evaluation of the float model takes minutes each
time. The cache is in the user's cache directory (`cache_dir.cache_directory`). Its key is a hash of everything that
determines the result. An entry holds the whole evaluation: scores, latencies and all detections.
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

from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.cache_dir import cache_directory
from act_pipeline.core.package_versions import versions
from act_pipeline.evaluation import Evaluation

BASELINE_SCHEMA = "act_pipeline.baseline/2"
FOLDER = "evaluations"
# Entries in the cache. Each takes some megabytes on COCO; the least recently used are removed.
KEPT = 16
_DECISIVE_PACKAGES = (
    "act_pipeline", "paddlepaddle", "paddlepaddle-gpu", "numpy", "pycocotools", "paddledet", "openvino", "onnxruntime",
    "onnxruntime-gpu", "tensorrt",
)  # fmt: skip


def cached_evaluation(
    model_hash: str, data_hash: str, engine: str, device: str, threads: int, evaluate: Callable[[], Evaluation]
) -> tuple[Evaluation, bool]:
    """Return an evaluation from the cache, or make and store it; a cache that cannot be written is ignored.

    Args:
        model_hash: hash of program and parameters (``InferenceModel.content_hash``).
        data_hash: hash of annotations, images and preprocessing (``Reader.fingerprint``).
        engine, device, threads: how the model is run; the number of threads matters, since it changes the order of
            floating-point sums.
        evaluate: makes the evaluation.

    Returns:
        The evaluation, and whether it was in the cache.
    """
    found = {name: version for name, version in versions().items() if name in _DECISIVE_PACKAGES}
    key = [BASELINE_SCHEMA, model_hash, data_hash, engine, device, threads, found]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_directory() / FOLDER / f"{name}.npz"
    kept = _read(path)
    if kept is not None:
        with contextlib.suppress(OSError):
            path.touch()  # entries are removed by the time of their last use
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
    """Return a stored evaluation; None if there is none or it cannot be read."""
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
