"""Cache of exported ONNX files next to the model: exported again when the model or the code of the export changes."""

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
    """Return the folder ``name`` in the model's folder, or one in the user's cache if that is not writable.

    Args:
        model: the model.
        name: name of the folder.

    Returns:
        The path; the folder is not created.
    """
    if os.access(model.directory, os.W_OK):
        return model.directory / name
    return cache_directory() / name / model.content_hash().partition(":")[2][:16]


def lowered_onnx(
    model: InferenceModel, target: str = "cpu", batch: int | None = None, float16: bool = False
) -> OnnxModel:
    """Return the cached ONNX export of a model, in ``onnx/`` in its folder; export it if it is missing or outdated.

    Args:
        model: an INT8 or a float model.
        target: Q/DQ format, a key of :data:`act_pipeline.onnx_export.TARGETS`.
        batch: the batch size; None: dynamic.
        float16: compute in FP16 what is not INT8, see :func:`act_pipeline.onnx_export.lower`.

    Returns:
        The ONNX file.

    Raises:
        UserError: as :func:`act_pipeline.onnx_export.lower`.
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
