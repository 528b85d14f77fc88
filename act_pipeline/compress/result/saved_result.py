"""The result of a compression in its folder: write it, and find whether an earlier one is current."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.result.calibration_baseline import CalibrationBaseline
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel, copy_infer_cfg
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.records import (
    ACT_FILENAME,
    ACT_SCHEMA,
    ANALYSIS_FILENAME,
    ANALYSIS_SCHEMA,
    RANGES_FILENAME,
    RANGES_SCHEMA,
    read_record,
    write_record,
)
from act_pipeline.data.infer_cfg import preprocess_section
from act_pipeline.evaluation import DETECTIONS_FILENAME, Evaluation, save_detections
from act_pipeline.evaluation.detections_file import CALIBRATION_FILENAME, save_calibration_detections


@dataclass
class Compressed:
    """Result of a compression.

    Attributes:
        model: the INT8 model.
        record: the content of ``act.json``.
        evaluation: the INT8 model's evaluation; None: nothing was evaluated, or the result was there already.
    """

    model: InferenceModel
    record: dict[str, Any]
    evaluation: Optional[Evaluation] = None


def write_result(
    target: Path,
    model: InferenceModel,
    chosen: Candidate,
    job: Job,
    record: Mapping[str, Any],
    usual: CalibrationBaseline | None = None,
) -> None:
    """Write the INT8 model, ``act.json`` and what was measured; an older result is replaced once this is complete.

    Args:
        target: the folder.
        model: the original float model, whose ``infer_cfg.yml`` is copied.
        chosen: the candidate to save.
        job: the compression.
        record: the content of ``act.json``.
        usual: figures on the calibration images, with which a server compares requests; None: there are none.
    """
    with new_artifact(target) as staging:
        for path, name in ((chosen.model.model_path, MODEL_FILENAME), (chosen.model.params_path, PARAMS_FILENAME)):
            shutil.copyfile(path, staging / name)
        # An imported model does not tell its preprocessing; from here on, other readers are refused.
        preprocess = {"Preprocess": preprocess_section(job.reader.settings)}
        copy_infer_cfg(model, staging, target, preprocess)
        if job.fp32 is not None and chosen.evaluation is not None:
            names = {image["id"]: image["file_name"] for image in job.reader.annotations("eval").images}
            save_detections(staging / DETECTIONS_FILENAME, {"fp32": job.fp32, "int8": chosen.evaluation}, names)
        if usual is not None:
            save_calibration_detections(staging / CALIBRATION_FILENAME, usual.rows, usual.images)
        if usual is not None and usual.shares:
            content = {"images": usual.range_images, "shares": dict(usual.shares)}
            write_record(staging / RANGES_FILENAME, RANGES_SCHEMA, content)
        if job.analysis is not None:
            write_record(staging / ANALYSIS_FILENAME, ANALYSIS_SCHEMA, job.analysis)
        write_record(staging / ACT_FILENAME, ACT_SCHEMA, dict(record))


def current_result(save_dir: Path, source: Mapping[str, Any]) -> Compressed | None:
    """Return the result in a folder if it was made from the same inputs and is unchanged, else None.

    Args:
        save_dir: the folder.
        source: the output of `compress.identity.source_identity`.
    """
    try:
        record = read_record(save_dir / ACT_FILENAME, ACT_SCHEMA)
        model = InferenceModel.load(save_dir)
    except UserError:
        return None
    same = all(record.get(key) == value for key, value in source.items())
    return Compressed(model, record) if same and record.get("model_hash") == model.content_hash() else None
