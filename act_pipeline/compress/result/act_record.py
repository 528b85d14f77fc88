"""The content of ``act.json`` from a finished compression: inputs, settings and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from act_pipeline.compress.candidates import Candidate, Candidates
from act_pipeline.compress.job import Job
from act_pipeline.compress.result.outcome import Measured
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.evaluation import ComparisonFigures
from act_pipeline.evaluation.act_candidates import FloatOp, ModelFigures, Step
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.act_measurements import EvaluatedIn, PlacementRecord


def compression_record(
    job: Job,
    chosen: Candidate,
    model: InferenceModel,
    seconds: Mapping[str, float],
    measured: Measured,
    placement: Optional[PlacementRecord] = None,
) -> ActRecord:
    """Return the part of ``act.json`` that describes the result of a compression.

    Args:
        job: the compression, with all candidates.
        chosen: the candidate that is saved.
        model: the original float model.
        seconds: stage -> seconds, of the stages before the strategy.
        measured: latency and reference evaluation of ``chosen``.
        placement: the placement by measurement; None: it was not asked for.
    """
    steps = [step_of(job.tried, candidate, candidate is chosen) for candidate in job.tried]
    stages = dict(seconds)
    engines, threads = job.judge.parallel
    for taken in (*(candidate.seconds for candidate in job.tried), measured.seconds):
        for stage, value in taken.items():
            stages[stage] = stages.get(stage, 0.0) + value
    return ActRecord(
        strategy=job.config.strategy.name,
        chosen=chosen.name,
        max_drop=job.tried.max_drop,
        min_agreement=job.tried.min_agreement,
        fp32=ModelFigures.of(job.fp32, model.bytes),
        int8=ModelFigures.of(chosen.evaluation, chosen.bytes),
        confidence=job.config.strategy.confidence if job.tried.limits else None,
        map_drop=map_drop(job.tried, chosen),
        comparison=compared(job.tried, chosen),
        bytes_ratio=chosen.bytes / model.bytes,
        seconds={name: round(value, 2) for name, value in stages.items()},
        quantizable_ops=len(job.selection.ops),
        quantized_ops=chosen.inventory.quantized,
        kept_ops=[FloatOp.from_json(op) for op in chosen.inventory.kept],
        weight_only_ops=[FloatOp.from_json(op) for op in chosen.inventory.weight_only],
        given_back=chosen.reverted,
        details=chosen.details.as_json(),
        steps=steps,
        evaluation=EvaluatedIn(
            engine=job.judge.engine,
            fp32_engine=job.judge.fp32_engine,
            why=job.judge.why,
            fp32_cached=job.fp32_cached,
            device=job.judge.device,
            engines=engines,
            threads=engines * threads,
            images=chosen.evaluation.images if chosen.evaluation else 0,
        ),
        latency=measured.latency,
        reference=measured.reference,
        placement=placement,
        model_hash=chosen.model.content_hash(),
        overrides=job.config.overrides,
    )


def compared(tried: Candidates, candidate: Candidate) -> ComparisonFigures:
    """Return a candidate's comparison with the float model; empty: it was not evaluated."""
    found = tried.compare(candidate)
    return ComparisonFigures() if found is None else found.figures(tried.max_drop, tried.min_agreement)


def map_drop(tried: Candidates, candidate: Candidate) -> float | None:
    """Return a candidate's drop of mAP; None: it was not evaluated, or there are no labels."""
    return tried.drop(candidate) if tried.has_map and candidate.evaluation else None


def step_of(tried: Candidates, candidate: Candidate, chosen: bool) -> Step:
    """Return the entry of ``steps`` of a candidate.

    Args:
        tried: all candidates.
        candidate: one of them.
        chosen: whether it is the saved model.
    """
    inventory = candidate.inventory
    return Step(
        name=candidate.name,
        strategy=candidate.strategy,
        note=candidate.note,
        figures=ModelFigures.of(candidate.evaluation, candidate.bytes, per_class=False),
        map_drop=map_drop(tried, candidate),
        comparison=compared(tried, candidate),
        quantized=sum(inventory.quantized.values()),
        kept=len(inventory.kept),
        weight_only=len(inventory.weight_only),
        seconds=round(sum(candidate.seconds.values()), 2),
        meets_max_drop=tried.meets(candidate),
        chosen=chosen,
    )
