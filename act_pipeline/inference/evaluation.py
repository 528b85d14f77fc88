"""Evaluate a model on a data set: in this process, or in several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.artifacts import location
from act_pipeline.engines import Artifact, Engine
from act_pipeline.engines.interface import parallel_requests
from act_pipeline.evaluation import Evaluation, evaluate, evaluate_in_parallel
from act_pipeline.inference.float_comparison import against_float
from act_pipeline.inference.outcome import InferenceOutcome, Say, finished, latency_line
from act_pipeline.inference.request import InferenceRequest


def evaluate_once(
    request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, say: Say
) -> InferenceOutcome:
    """Evaluate in this process, and compare with the float model's detections where an INT8 model has them."""
    say(f"evaluating {location(model)}: {engine.name} {engine.precision} on {engine.device}, {engine.threads} threads")
    requests = parallel_requests(engine)
    if requests == 1:
        evaluation = evaluate(engine, reader, "eval", limit=request.limit, batch_size=request.batch_size)
        assert evaluation.latency_ms is not None, "one engine ran, alone"
        speed = latency_line(evaluation.latency_ms, evaluation.images_per_second, evaluation.batch_size)
        more = {}
    else:
        evaluation = evaluate_in_parallel(
            [engine] * requests, reader, limit=request.limit, batch_size=request.batch_size
        )
        speed = (
            f"{evaluation.images_per_second:.2f} images/s with {requests} parallel requests, reading the images "
            "included; --benchmark=True times the model alone"
        )
        more = {"requests": requests}
    compared, said = against_float(model, evaluation, reader)
    record = evaluation.as_record(engine, model, reader, executor="local", shards=1, **more, **compared)
    lines = [*_score_lines(evaluation), *said, speed]
    return finished(request, InferenceOutcome(lines=lines, evaluation=evaluation, record=record))


def evaluate_sharded(
    request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, say: Say, options: Mapping[str, Any]
) -> InferenceOutcome:
    """Evaluate in several processes, in engines made as ``engine`` was, with ``options``."""
    from act_pipeline.evaluation.sharded import evaluate_in_shards

    where = "on a Ray cluster" if request.executor == "ray" else f"in {request.shards} processes"
    say(
        f"evaluating {location(model)} {where}: {engine.name} {engine.precision} on {engine.device}, {engine.threads} "
        "threads each"
    )
    sharded = evaluate_in_shards(
        engine,
        model,
        reader,
        request.shards,
        executor=request.executor,
        ray_address=request.ray_address,
        limit=request.limit,
        batch_size=request.batch_size,
        options=options,
    )
    evaluation = sharded.evaluation
    compared, said = against_float(model, evaluation, reader)
    lines = [
        *_score_lines(evaluation),
        *said,
        f"{evaluation.images_per_second:.2f} images/s in {sharded.shards} processes, {sharded.wall_seconds:.1f} s with "
        "their start; for latencies, run in one process",
    ]
    record = evaluation.as_record(engine, model, reader, **sharded.more, **compared)
    return finished(request, InferenceOutcome(lines=lines, evaluation=evaluation, record=record))


def _score_lines(evaluation: Evaluation) -> list[str]:
    if not evaluation.has_map:
        return [f"no labels, no mAP on {evaluation.images} images"]
    scores = f"{', '.join(evaluation.figures())} on {evaluation.images} images"
    return [*evaluation.summary, scores]
