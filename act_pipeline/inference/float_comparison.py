"""Comparison of an evaluation with the float model's detections stored with an INT8 model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.artifacts import ModelFile
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, as_number, read_record
from act_pipeline.engines import Artifact
from act_pipeline.evaluation import (
    DETECTIONS_FILENAME,
    ComparisonFigures,
    Evaluation,
    GroundTruth,
    compare_with_kept,
)
from act_pipeline.evaluation.certainty import agreement_line


def against_float(model: Artifact, evaluation: Evaluation, reader: Any) -> tuple[dict[str, Any], list[str]]:
    """Compare an evaluation with the float model's detections stored with the model, if there are any.

    Args:
        model: the evaluated model.
        evaluation: its evaluation on the reader's eval split.
        reader: the data.

    Returns:
        entries of ``eval.json``: ``compared_images``, ``map_drop`` and the keys of
        :class:`act_pipeline.evaluation.ComparisonFigures`, None if nothing was compared; and the lines to print.
    """
    nothing = {"compared_images": None, "map_drop": None, **ComparisonFigures().as_json()}
    path = _kept(model)
    if path is None:
        return nothing, []
    try:
        found = compare_with_kept(path, evaluation, GroundTruth.load(reader, "eval"))
    except UserError as error:
        return nothing, [f"not compared with the float model: {error}"]
    if found is None:
        return nothing, [f"not compared with the float model: {path} is of other images"]
    difference = found.difference
    record = {
        "compared_images": found.images,
        "map_drop": None if difference is None else -difference.difference,
        **found.figures(*(_limit(path.parent, name) for name in ("max_drop", "min_agreement"))).as_json(),
    }
    said = "the images have no labelled objects"
    if difference is not None:
        said = (
            f"mAP {difference.difference:+.4f} (95% of {difference.resamples:,} resamples: {difference.low:+.4f} to "
            f"{difference.high:+.4f})"
        )
    if found.miou is not None:
        miou = found.miou
        said += f"; mIoU {miou.difference:+.4f} ({miou.low:+.4f} to {miou.high:+.4f})"
    if found.loss is not None:
        said += f"; agreement {found.loss.agreement:.4f} ({1 + found.loss.low:.4f} to {1 + found.loss.high:.4f})"
    return record, [f"against FP32 on {found.images:,} images: {said}; {agreement_line(found.agreement)}"]


def _kept(model: Artifact) -> Optional[Path]:
    # An exported ONNX file is in onnx/ in the folder of its model.
    folders = [model.path.parent, model.path.parent.parent] if isinstance(model, ModelFile) else [model.directory]
    return next((path for folder in folders if (path := Path(folder) / DETECTIONS_FILENAME).is_file()), None)


def _limit(folder: Path, name: str) -> Optional[float]:
    with contextlib.suppress(UserError):
        return as_number(read_record(folder / ACT_FILENAME, ACT_SCHEMA).get(name))
    return None
