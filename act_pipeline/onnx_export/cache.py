"""Lowered files beside the model that they are of: made once, and again when the model or the lowering has changed."""

from __future__ import annotations

import os
from pathlib import Path

from act_pipeline.core.artifacts import ONNX_SCHEMA, InferenceModel, OnnxModel
from act_pipeline.core.cache_dir import cache_directory
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.onnx_export.export import lower, lowering_hash

ONNX_DIRECTORY = "onnx"


def writable_directory(model: InferenceModel | OnnxModel, name: str) -> Path:
    """Return the folder ``name`` in the model's folder, or one in the user's cache if that cannot be written to."""
    if os.access(model.directory, os.W_OK):
        return model.directory / name
    return cache_directory() / name / model.content_hash().partition(":")[2][:16]


def lowered_onnx(
    model: InferenceModel, target: str = "cpu", batch: int | None = None, float16: bool = False
) -> OnnxModel:
    """Return ``model`` as ONNX, in ``onnx/`` in its folder; lowered now unless that was done before.

    Args:
        model: ACT's INT8 model or a float one.
        target: a key of :data:`act_pipeline.onnx_export.TARGETS`.
        batch: the batch size, None for any.
        float16: float work in FP16, as :func:`act_pipeline.onnx_export.export` has it.

    Raises:
        UserError: as :func:`act_pipeline.onnx_export.export`.
    """
    name = f"{Path(model.model_filename).stem}_{target}{'_fp16' if float16 else ''}{f'_b{batch}' if batch else ''}.onnx"
    onnx_model = OnnxModel(writable_directory(model, ONNX_DIRECTORY) / name)
    if not _is_of(onnx_model, model):
        lower(model, onnx_model.path, target, batch=batch, float16=float16)
    return onnx_model


def _is_of(onnx_model: OnnxModel, model: InferenceModel) -> bool:
    if not onnx_model.path.exists():
        return False
    try:
        record = read_record(onnx_model.record_path, ONNX_SCHEMA)
    except UserError:
        return False
    return (
        record.get("source_hash") == model.content_hash()
        and record.get("lowering_hash") == lowering_hash()
        and record.get("bytes") == onnx_model.bytes
    )
