"""The content of ``act.json``: inputs, settings and results of a compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.outcome import Measured
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.evaluation import NOT_COMPARED, Evaluation


def compression_record(
    job: Job, chosen: Candidate, model: InferenceModel, seconds: Mapping[str, float], measured: Measured
) -> dict[str, Any]:
    """Return the entries of ``act.json`` that describe the result of a compression.

    Args:
        job: the compression, with all candidates.
        chosen: the candidate that is saved.
        model: the original float model.
        seconds: stage -> seconds, of the stages before the strategy.
        measured: latency and reference evaluation of ``chosen``.
    """
    steps = [_step(job, candidate, candidate is chosen) for candidate in job.tried]
    stages = dict(seconds)
    engines, threads = job.judge.parallel
    for taken in (*(candidate.seconds for candidate in job.tried), measured.seconds):
        for stage, value in taken.items():
            stages[stage] = stages.get(stage, 0.0) + value
    return {
        "strategy": job.config.strategy.name,
        "chosen": chosen.name,
        "max_drop": job.tried.max_drop,
        "fp32": _figures(job.fp32, model.bytes),
        "int8": _figures(chosen.evaluation, chosen.bytes),
        "confidence": job.config.strategy.confidence if job.tried.max_drop is not None else None,
        "map_drop": job.tried.drop(chosen) if chosen.evaluation else None,
        **_compared(job, chosen),
        "bytes_ratio": chosen.bytes / model.bytes,
        "seconds": {name: round(value, 2) for name, value in stages.items()},
        "quantizable_ops": len(job.selection.ops),
        "quantized_ops": chosen.inventory.quantized,
        "kept_ops": chosen.inventory.kept,
        "weight_only_ops": chosen.inventory.weight_only,
        "given_back": [],
        **chosen.record,
        "steps": steps,
        "evaluation": {
            "engine": job.judge.engine,
            "fp32_engine": job.judge.fp32_engine,
            "why": job.judge.why,
            "fp32_cached": job.fp32_cached,
            "device": job.judge.device,
            "engines": engines,
            "threads": engines * threads,
            "images": chosen.evaluation.images if chosen.evaluation else 0,
        },
        "latency": measured.latency,
        "reference": measured.reference,
        "model_hash": chosen.model.content_hash(),
        "overrides": list(job.config.overrides),
    }


def _figures(evaluation: Optional[Evaluation], size: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "map": evaluation.map if evaluation else None,
        "map50": evaluation.map50 if evaluation else None,
        "bytes": size,
    }
    if evaluation:
        figures.update(
            stats=evaluation.stats,
            per_class=evaluation.per_class,
            latency_ms=evaluation.latency_ms,
            images_per_second=evaluation.images_per_second,
        )
    return figures


def _compared(job: Job, candidate: Candidate) -> dict[str, Any]:
    found = job.tried.compare(candidate)
    return dict(NOT_COMPARED) if found is None else found.as_record(job.tried.max_drop)


def _step(job: Job, candidate: Candidate, chosen: bool) -> dict[str, Any]:
    inventory = candidate.inventory
    return {
        "name": candidate.name,
        "strategy": candidate.strategy,
        "note": candidate.note,
        **{
            name: value
            for name, value in _figures(candidate.evaluation, candidate.bytes).items()
            if name != "per_class"
        },
        "map_drop": job.tried.drop(candidate) if candidate.evaluation else None,
        **_compared(job, candidate),
        "quantized": sum(inventory.quantized.values()),
        "kept": len(inventory.kept),
        "weight_only": len(inventory.weight_only),
        "seconds": round(sum(candidate.seconds.values()), 2),
        "meets_max_drop": job.tried.meets(candidate),
        "chosen": chosen,
    }
