"""A version: the folder of a model in a repository, with the record of its promotion."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.artifacts import (
    MODEL_FILENAME,
    PARAMS_FILENAME,
    InferenceModel,
    OnnxModel,
    PlanModel,
    copy_infer_cfg,
)
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.records import (
    ACT_FILENAME,
    ACT_SCHEMA,
    RANGES_FILENAME,
    as_number,
    read_record,
    write_record,
)
from act_pipeline.engines import inspect_artifact
from act_pipeline.engines.tensorrt.plan import source_of_plan
from act_pipeline.evaluation.detections_file import CALIBRATION_FILENAME, DETECTIONS_FILENAME
from act_pipeline.serving.baseline import Baseline, recorded_baseline
from act_pipeline.serving.durable_files import sync_files, sync_folder
from act_pipeline.serving.ranges import checked_ranges, read_ranges
from act_pipeline.serving.verdict import Verdict

VERSION_SCHEMA, VERSION_FILENAME = "act_pipeline.version/1", "version.json"
# A TensorRT plan of the model, and the ONNX file that tells what its outputs mean.
PLAN_FILENAME, PLAN_SOURCE_FILENAME = "model.plan", "model.onnx"


@dataclass(frozen=True)
class Version:
    """A version in a repository.

    Attributes:
        number: its number.
        folder: its folder; :attr:`model` is in it.
        source: the folder that it was copied from.
        model_hash: hash of the model's files.
        passed, verdict: whether its compression's record let it pass, and the figures or the reason.
        map: mAP in the record; None: not evaluated, or no labels.
        baseline: what it detected when it was evaluated; None: not recorded.
        float_model: folder of the float model that its shadow requests run in; None: there is none.
        ranges: share of the activations beyond their ranges on the calibration images, by tensor; empty: not recorded.
    """

    number: int
    folder: Path
    source: str
    model_hash: str
    passed: bool
    verdict: str
    map: Optional[float] = None
    baseline: Optional[Baseline] = None
    float_model: Optional[str] = None
    ranges: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> InferenceModel:
        """The model.

        Raises:
            UserError: a file is missing.
        """
        return InferenceModel.load(self.folder)

    @classmethod
    def read(cls, folder: Path) -> Version:
        """Read a version's record.

        Raises:
            UserError: it is missing or damaged.
        """
        path = folder / VERSION_FILENAME
        record = read_record(path, VERSION_SCHEMA)
        try:
            baseline, number, float_model = record.get("baseline"), record["version"], record.get("float_model")
            if type(number) is not int or str(number) != folder.name:
                raise ValueError(f"version is {number!r:.40}, expected {folder.name} as its folder's name")
            if not (float_model is None or isinstance(float_model, str)):
                raise ValueError(f"float_model is {float_model!r:.40}, expected a folder")
            return cls(
                number=number,
                folder=folder,
                source=str(record["source"]),
                model_hash=str(record["model_hash"]),
                passed=record["passed"] is True,
                verdict=str(record["verdict"]),
                map=as_number(record.get("map")),
                baseline=None if baseline is None else Baseline.from_json(baseline),
                float_model=float_model,
                # Records of earlier versions of this package have none.
                ranges=checked_ranges(record.get("ranges") or {}, path),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); promote the model again") from None


def write_version(
    folder: Path,
    model: InferenceModel,
    verdict: Verdict,
    category_ids: Optional[Sequence[int]] = None,
    float_model: Optional[Path] = None,
    plan: Optional[PlanModel] = None,
) -> Version:
    """Copy a model into a new version's folder, complete or absent.

    Args:
        folder: the folder, named by the version's number.
        model: the model; its ``act.json`` and kept detections are copied too.
        verdict: the verdict on it.
        category_ids: see :func:`act_pipeline.serving.baseline.recorded_baseline`.
        float_model: folder of the float model for shadow requests.
        plan: a TensorRT plan of the model, which is copied with its ONNX file.

    Raises:
        UserError: its kept detections are damaged, or the plan's ONNX file is missing or of another model.
    """
    baseline = recorded_baseline(model, category_ids)
    ranges = read_ranges(model.directory / RANGES_FILENAME)
    source = None if plan is None else _source_of(plan, model)
    with new_artifact(folder) as staging:
        shutil.copyfile(model.model_path, staging / MODEL_FILENAME)
        shutil.copyfile(model.params_path, staging / PARAMS_FILENAME)
        copy_infer_cfg(model, staging, folder)
        for name in (ACT_FILENAME, DETECTIONS_FILENAME, CALIBRATION_FILENAME, RANGES_FILENAME):
            if (model.directory / name).is_file():
                shutil.copyfile(model.directory / name, staging / name)
        if plan is not None and source is not None:
            # Without its record, which names paths of the machine that built it.
            shutil.copyfile(plan.path, staging / PLAN_FILENAME)
            shutil.copyfile(source.path, staging / PLAN_SOURCE_FILENAME)
        record: dict[str, Any] = {
            "version": int(folder.name),
            "source": str(model.directory.absolute()),
            "model_hash": model.content_hash(),
            "passed": verdict.passed,
            "verdict": verdict.reason,
            "map": _recorded_map(model),
            "baseline": None if baseline is None else baseline.as_json(),
            "float_model": None if float_model is None else str(float_model.absolute()),
            "ranges": ranges,
        }
        write_record(staging / VERSION_FILENAME, VERSION_SCHEMA, record)
        sync_files(staging)
    sync_folder(folder.parent)
    return Version.read(folder)


def _source_of(plan: PlanModel, model: InferenceModel) -> OnnxModel:
    """Return the ONNX file of a plan.

    Raises:
        UserError: it is missing, or has another input or precision than the model.
    """
    found, wanted = inspect_artifact(plan), inspect_artifact(model)
    for what, of_plan, of_model in (
        ("an input of", found.input_size, wanted.input_size),
        ("INT8", found.quantized, wanted.quantized),
    ):
        if of_plan is not None and of_model is not None and of_plan != of_model:
            raise UserError(
                f"{plan.path} is of another model than {model.directory}: {what} {of_plan}, expected {of_model}; build "
                "it from this one"
            )
    return source_of_plan(plan)


def _recorded_map(model: InferenceModel) -> Optional[float]:
    try:
        figures = read_record(model.directory / ACT_FILENAME, ACT_SCHEMA).get("int8")
    except UserError:
        return None
    return as_number(figures.get("map")) if isinstance(figures, dict) else None
