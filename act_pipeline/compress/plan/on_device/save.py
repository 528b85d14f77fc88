"""The INT8 model of a placement on a device: made, evaluated where that is possible here, and recorded."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.calibration.feeds import evaluated_splits
from act_pipeline.compress.candidates import MEASURED, Candidate, Candidates
from act_pipeline.compress.judging.choice import choose_judge
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.compress.plan.on_device.study import Study
from act_pipeline.compress.plan.on_device.write import act_of, weights_of
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.plan.placed import keep_placed, placed_candidate, placement_record
from act_pipeline.compress.plan.placement import Placement
from act_pipeline.compress.result.act_record import compared, map_drop, step_of
from act_pipeline.config.sections import Strategy
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel, copy_infer_cfg
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, ANALYSIS_FILENAME, read_record, write_record
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader
from act_pipeline.engines.device import paddle_device
from act_pipeline.evaluation import DETECTIONS_FILENAME, Evaluation, save_detections
from act_pipeline.evaluation.act_candidates import FloatOp, ModelFigures
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.act_measurements import EvaluatedIn
from act_pipeline.graph.folding import fold
from act_pipeline.graph.op_types import QUANTIZABLE_OPS
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import static_mode

_SECTION = "QuantAware"


@dataclass(frozen=True)
class Saved:
    """The model of a placement.

    Attributes:
        act: its record.
        unevaluated: why its accuracy is not known; None: it is, or the model was not changed.
    """

    act: ActRecord
    unevaluated: str | None


@dataclass(frozen=True)
class _Evaluating:
    """What evaluates: the engine, the data, and the float model's evaluation."""

    judge: Judge
    reader: Reader
    fp32: Evaluation


def save_placed(
    study: Study,
    found: Placement,
    engine: str,
    device: str,
    save_dir: Path,
    reader_config: str | None,
    say: Callable[[str], None],
) -> Saved:
    """Write the INT8 model of a decision and its ``act.json``; an older one is replaced once this is complete.

    The model with reverted ops is evaluated in the engine and on the data of its compression, and kept if it is within
    the limits of that, as every candidate. Where these are not here, it is kept without an evaluation.

    Args:
        study: the candidates.
        found: the decision.
        engine: the runtime with its version.
        device: the GPU.
        save_dir: the folder.
        reader_config: reader YAML of the data; None: the one that ``act.json`` names.
        say: called with a progress line.

    Raises:
        UserError: ``reader_config`` does not fit the model or is not the data that it was evaluated on before.
    """
    act = act_of(study.model)
    unevaluated, evaluating = None, None
    if found.ops:
        try:
            evaluating = _evaluating(study, act, reader_config, say)
        except UserError as error:
            if reader_config is not None:
                raise
            unevaluated = str(error)
    with static_mode(), tempfile.TemporaryDirectory(prefix="act-placement-") as made:
        work = Path(made)
        chosen = _chosen(study, act, weights_of(study, work / "folded"))
        limits = _limits(act)
        if evaluating is None:
            tried = Candidates(limits, None, None, None, progress=False)
        else:
            tried = Candidates(limits, evaluating.judge, evaluating.reader, evaluating.fp32, progress=True)
        tried.add(chosen)
        (work / "placed").mkdir()
        placed = placed_candidate(chosen, found, engine, work / "placed", QUANTIZABLE_OPS, _SECTION)
        kept, found = keep_placed(tried, chosen, placed, found, say)
        act = dataclasses.replace(
            act,
            placement=placement_record(
                found, engine, study.ops, len(study.steps), 0, device=device, batch=study.of.batch
            ),
        )
        if placed is not None:
            act = _with_candidates(act, study, tried, kept, evaluating)
        _write(study.model, kept, act, save_dir, evaluating)
    return Saved(act, unevaluated if kept is placed else None)


def _evaluating(study: Study, act: ActRecord, given: str | None, say: Callable[[str], None]) -> _Evaluating:
    """Return what the candidates are evaluated with.

    Raises:
        UserError: the engine or the data are not here, or are others than those of the compression.
    """
    if not act.evaluation.images:
        raise UserError(f"{study.model.directory} was compressed without an evaluation")
    places = act.config.get("Global") or {}
    named = given or places.get("reader_config")
    if not isinstance(named, str):
        raise UserError(f"{study.model.directory / ACT_FILENAME} names no reader; give --reader_config")
    fitted = fit_reader(study.model, Reader.load(find_shipped(named))).reader
    reader, _ = evaluated_splits(fitted, places.get("Evaluation"))
    reader.check("eval")
    if reader.fingerprint("eval") != act.data_hash.get("eval"):
        raise UserError(
            f"the eval split of {reader.path} is not the one that {study.model.directory} was evaluated on; give the "
            "reader of its compression with --reader_config"
        )
    judge = choose_judge(act.evaluation.engine or "auto", paddle_device("auto"), study.float_model)
    say(f"evaluating in {judge.engine}")
    fp32, _ = judge.evaluate_float(study.float_model, reader, progress=True)
    return _Evaluating(judge, reader, fp32)


def _limits(act: ActRecord) -> Strategy:
    confidence = MEASURED if act.confidence is None else act.confidence
    return Strategy(max_drop=act.max_drop, min_agreement=act.min_agreement, confidence=confidence)


def _chosen(study: Study, act: ActRecord, source: InferenceModel | None) -> Candidate:
    """Return the INT8 model as the candidate that its compression chose."""
    graph = fold(study.float_model)
    try:
        ops = tuple(quantizable_ops(graph, QUANTIZABLE_OPS))
    finally:
        graph.close()
    kept = {op.output: op.reason or "" for op in act.kept_ops}
    selection = Selection(ops, kept, tuple(op.output for op in act.weight_only_ops))
    inventory = inventory_of(study.model, QUANTIZABLE_OPS, _SECTION, selection)
    strategy = next((step.strategy for step in act.steps if step.chosen), None) or act.strategy or "ptq"
    return Candidate(act.chosen or strategy, strategy, study.model, source, selection, inventory)


def _with_candidates(
    act: ActRecord, study: Study, tried: Candidates, kept: Candidate, evaluating: _Evaluating | None
) -> ActRecord:
    """Return the record with the candidate of the placement, about the model that is kept."""
    placed = list(tried)[-1]
    steps = [dataclasses.replace(step, chosen=step.chosen and kept is not placed) for step in act.steps]
    act = dataclasses.replace(act, steps=[*steps, step_of(tried, placed, kept is placed)])
    if kept is not placed:
        return act
    evaluation = dataclasses.replace(act.evaluation, images=0)
    if evaluating is not None:
        judge, (engines, threads) = evaluating.judge, evaluating.judge.parallel
        evaluation = EvaluatedIn(
            judge.engine, judge.fp32_engine, judge.why, True, judge.device, engines, engines * threads,
            evaluating.fp32.images,
        )  # fmt: skip
        act = dataclasses.replace(act, fp32=ModelFigures.of(evaluating.fp32, study.float_model.bytes))
    return dataclasses.replace(
        act,
        chosen=kept.name,
        int8=ModelFigures.of(kept.evaluation, kept.bytes),
        map_drop=map_drop(tried, kept),
        comparison=compared(tried, kept),
        bytes_ratio=kept.bytes / study.float_model.bytes,
        quantized_ops=kept.inventory.quantized,
        kept_ops=[FloatOp.from_json(op) for op in kept.inventory.kept],
        weight_only_ops=[FloatOp.from_json(op) for op in kept.inventory.weight_only],
        evaluation=evaluation,
        latency=None,  # of another model, in another runtime
        reference=None,
        model_hash=kept.model.content_hash(),
    )


def _write(
    model: InferenceModel, kept: Candidate, act: ActRecord, save_dir: Path, evaluating: _Evaluating | None
) -> None:
    record: Mapping[str, Any] = read_record(model.directory / ACT_FILENAME, ACT_SCHEMA)
    with new_artifact(save_dir) as staging:
        for path, name in ((kept.model.model_path, MODEL_FILENAME), (kept.model.params_path, PARAMS_FILENAME)):
            shutil.copyfile(path, staging / name)
        copy_infer_cfg(model, staging, save_dir)
        if kept.evaluation is not None and evaluating is not None:
            names = {image["id"]: image["file_name"] for image in evaluating.reader.annotations("eval").images}
            save_detections(staging / DETECTIONS_FILENAME, {"fp32": evaluating.fp32, "int8": kept.evaluation}, names)
        elif kept.model is model and (model.directory / DETECTIONS_FILENAME).is_file():
            shutil.copyfile(model.directory / DETECTIONS_FILENAME, staging / DETECTIONS_FILENAME)
        if (model.directory / ANALYSIS_FILENAME).is_file():
            shutil.copyfile(model.directory / ANALYSIS_FILENAME, staging / ANALYSIS_FILENAME)
        write_record(staging / ACT_FILENAME, ACT_SCHEMA, {**record, **act.as_json()})
