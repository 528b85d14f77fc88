"""Shape ranges of every tensor, which TensorRT needs at build time: collected once, stored next to the model.

``dynamic_shape.txt`` is Paddle's own file (a ``ShapeRangeInfos`` protobuf as text). ``dynamic_shape.json`` next to it
records the model and the input size that the shapes were collected with, so that a file of another one is detected.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import write_record
from act_pipeline.engines.paddle.native import GPU_MEMORY_POOL_MB, Predictor
from act_pipeline.graph.model_files import ModelSummary

SHAPES_FILENAME = "dynamic_shape.txt"
RECORD_FILENAME = "dynamic_shape.json"
SCHEMA = "act_pipeline.dynamic_shape/1"


@dataclass(frozen=True)
class ShapeKey:
    """Everything that the shapes depend on.

    Attributes:
        model_hash: hash of the program and the parameters.
        input_size: (height, width) of the network's input, pixels.
        max_batch_size: the largest batch; the shapes are valid for smaller ones too.
        paddle: version of Paddle; other versions may name tensors differently.
    """

    model_hash: str
    input_size: tuple[int, int]
    max_batch_size: int
    paddle: str


def shapes_path(model: InferenceModel) -> Path:
    """Return the path of ``dynamic_shape.txt`` of a model."""
    return model.directory / SHAPES_FILENAME


def record_path(model: InferenceModel) -> Path:
    """Return the path of ``dynamic_shape.json`` of a model, which records what the shapes were collected from."""
    return model.directory / RECORD_FILENAME


def stale_reason(model: InferenceModel, key: ShapeKey) -> str | None:
    """Return why the shapes must be collected (again); None if the file can be used.

    Args:
        model: the model whose files are read.
        key: what the shapes are needed for.

    Returns:
        One line for users, or None.
    """
    shapes, record = shapes_path(model), record_path(model)
    if not shapes.exists():
        return f"{shapes} is not there yet"
    if not record.exists():
        return f"{shapes} has no {RECORD_FILENAME} that says what it was collected from"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError("schema")
        kept = ShapeKey(
            str(found["model_hash"]),
            (int(found["input_size"][0]), int(found["input_size"][1])),
            int(found["max_batch_size"]),
            str(found["paddle"]),
        )
        kept_hash = str(found["shapes_hash"])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return f"{record} is damaged"
    if kept.model_hash != key.model_hash:
        return f"{shapes} was collected from another model"
    if kept.input_size != key.input_size:
        return f"{shapes} was collected at {_size(kept.input_size)}, the input is {_size(key.input_size)}"
    if kept.max_batch_size < key.max_batch_size:
        return f"{shapes} was collected for batches up to {kept.max_batch_size}, asked for {key.max_batch_size}"
    if kept.paddle != key.paddle:
        return f"{shapes} was collected by Paddle {kept.paddle!r}, this is {key.paddle!r}"
    if kept_hash != hash_files([shapes]):
        return f"{shapes} was changed after it was collected"
    return None


def collect(
    model: InferenceModel,
    key: ShapeKey,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    device: str = "CPU",
    threads: int = 1,
    summary: ModelSummary | None = None,
    inference: Any = None,
) -> Path:
    """Run batches through the model with shape collection and write the range of every tensor's shape.

    Args:
        model: the model; both files are written to its folder, each atomically.
        key: what the shapes depend on, written to the record.
        batches: inputs of :meth:`act_pipeline.engines.interface.Engine.run`, including the smallest and the largest
            batch.
        device: ``GPU``, or ``CPU``, which needs neither a GPU nor TensorRT; the file can be used on another machine.
        threads: number of CPU threads.
        summary: summary of ``model``; None: it is read.
        inference: ``paddle.inference`` or a stand-in; None: imported.

    Returns:
        The path of ``dynamic_shape.txt``.

    Raises:
        UserError: Paddle cannot run the model, or wrote no shapes.
    """
    target, record = shapes_path(model), record_path(model)
    # Paddle raises nothing when it cannot write its file: creating one here reveals missing permissions.
    handle, name = tempfile.mkstemp(prefix=f".{SHAPES_FILENAME}.", dir=model.directory)
    os.close(handle)

    def configure(config: Any, namespace: Any) -> None:
        if device == "GPU":
            config.enable_use_gpu(GPU_MEMORY_POOL_MB, 0)
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(threads)
        config.collect_shape_range_info(name)

    predictor = None
    try:
        predictor = Predictor(model, configure, summary, inference)
        for batch in batches:
            predictor.run(batch)
        predictor.close()  # Paddle writes the file when the predictor is destroyed
        if os.path.getsize(name) == 0:
            raise UserError(
                f"Paddle collected no shapes into {target}; free some disk space, or run with --use_dynamic_shape=False"
            )
        with suppress(FileNotFoundError):
            record.unlink()  # a kill between the two writes leaves shapes without a record: they are collected again
        os.chmod(name, 0o644)
        os.replace(name, target)
        write_record(
            record,
            SCHEMA,
            {
                **asdict(key),
                "device": device,
                "shapes_hash": hash_files([target]),
                "collected": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
    finally:
        if predictor is not None:
            predictor.close()
        with suppress(FileNotFoundError):
            os.unlink(name)
    return target


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
