"""Results of a benchmark as a record and as text: rows, ratios, and remarks below the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.benchmark.plan import PADDLE_INFERENCE, BenchmarkedModel, BenchmarkRequest, Models
from act_pipeline.benchmark.rows import BenchmarkRecord, ComparedModel, LoadRow, Row, RunSettings
from act_pipeline.benchmark.runs import Run
from act_pipeline.benchmark.timing import speed_ratio
from act_pipeline.benchmark.worker import UNTIMED_RUNS
from act_pipeline.core.artifacts import location
from act_pipeline.core.package_versions import versions
from act_pipeline.engines import Machine
from act_pipeline.engines.interface import AUTO_REQUESTS
from act_pipeline.evaluation.batches import mean_and_percentiles


def benchmark_record(
    runs: Sequence[Run],
    models: Models,
    here: Machine,
    settings: RunSettings,
    reader: Any,
    notes: Sequence[str],
    throughput: Sequence[LoadRow] = (),
) -> BenchmarkRecord:
    """Return the content of ``benchmark.json``, with the rows that ran sorted by latency, then those that failed.

    Args:
        runs: the measurements.
        models: the compared models.
        here: the machine.
        settings: see :func:`run_settings`.
        reader: the reader; None if none was used.
        notes: notes for the user.
        throughput: the rows of ``--throughput``; the runs then give versions only.
    """
    rows = [] if throughput else _rows(runs, settings.batch_size or 1)
    return BenchmarkRecord(
        machine={key: value for key, value in dataclasses.asdict(here).items() if key != "absent"},
        versions=_versions(runs),
        settings=settings,
        fp32=_compared(models.float_),
        int8=_compared(models.int8),
        reader=str(reader.path) if reader is not None else None,
        reader_hash=reader.fingerprint() if reader is not None else None,
        notes=list(notes),
        rows=sorted(rows, key=lambda row: (row.failure is not None, row.p50)),
        throughput=throughput,
    )


def _rows(runs: Sequence[Run], batch_size: int) -> list[Row]:
    """Return the rows with descriptions, percentiles and ratios."""
    measured = {run.label: run for run in runs if run.failure is None}
    paddle = [measured[f"{name} fp32"] for name in PADDLE_INFERENCE if f"{name} fp32" in measured]
    baseline = min(paddle, key=lambda run: float(np.median(run.seconds)), default=None)
    rows = []
    for run in runs:
        candidate, loaded = run.candidate, run.worker.loaded if run.worker is not None else None
        timed = run.failure is None
        own = measured.get(f"{candidate.engine} fp32")
        rows.append(
            Row(
                label=run.label,
                engine=candidate.engine,
                precision=candidate.precision,
                device=candidate.device,
                failure=run.failure,
                how=candidate.how,
                threads=loaded.threads if loaded else None,
                settings=loaded.settings if loaded else {},
                artifact=loaded.artifact if loaded and loaded.artifact else str(candidate.model.directory),
                model_bytes=(loaded and loaded.artifact_bytes) or candidate.model.bytes,
                model_hash=(loaded and loaded.artifact_hash) or candidate.model.content_hash(),
                made_seconds=candidate.made_seconds,
                latency_ms=mean_and_percentiles(run.seconds) if timed else None,
                device_latency_ms=mean_and_percentiles([ms / 1000 for ms in run.device_ms])
                if timed and run.device_ms
                else None,
                images_per_second=round(batch_size * len(run.seconds) / sum(run.seconds), 3) if timed else None,
                ratio_to_fp32=speed_ratio(own.seconds, run.seconds, own.label) if timed and own else None,
                ratio_to_paddle_fp32=(
                    speed_ratio(baseline.seconds, run.seconds, baseline.label) if timed and baseline else None
                ),
                timings_ms=[round(seconds * 1000, 4) for seconds in run.seconds],
                unsettled_runs=run.unsettled,
                map=run.map,
                map50=run.map50,
                miou=run.miou,
                images=run.images,
                map_failure=run.map_failure,
                memory=run.memory,
                start_seconds=run.start_seconds,
                first_start_seconds=run.first_start_seconds,
            )
        )
    return rows


def heading(record: BenchmarkRecord) -> str:
    """Return the line above the table."""
    settings = record.settings
    if record.throughput:
        return (
            f"{record.machine['cpu']}, {settings.threads} threads, for each load {settings.rounds} rounds of "
            f"{settings.burst_seconds:g} s on {settings.input}"
        )
    return (
        f"{record.machine['cpu']}, {settings.threads} threads, batch {settings.batch_size}, "
        f"{settings.rounds} rounds on {settings.input}"
    )


def remarks(record: BenchmarkRecord) -> list[str]:
    """Return the lines below the table."""
    rows = record.rows
    if record.throughput:
        return [*load_remarks(record.throughput), *record.notes]
    lines = [f"failed: {row.label}: {row.failure}" for row in rows if row.failure is not None]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.map_failure:
            reasons.setdefault(row.map_failure, []).append(row.label)
    lines += [f"no mAP: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
    to_paddle = next((row.ratio_to_paddle_fp32.to for row in rows if row.ratio_to_paddle_fp32), None)
    if to_paddle is not None:
        lines.append(f"x Paddle: to {to_paddle}, the faster of Paddle Inference's own that ran")
    lines += [f"{row.label}: made in {row.made_seconds:.1f} s" for row in rows if row.made_seconds is not None]
    return [*lines, *record.notes]


def load_remarks(rows: Sequence[LoadRow]) -> list[str]:
    """Return the lines below the table of ``--throughput``: what failed, and the best load of each engine."""
    reasons: dict[tuple[str, str], list[str]] = {}
    best: dict[str, LoadRow] = {}
    for row in rows:
        if row.failure is not None or row.images_per_second is None:
            where = f"batch {row.batch_size}, {counted_requests(row.requests)}"
            reasons.setdefault((row.label, str(row.failure)), []).append(where)
        elif row.label not in best or row.images_per_second > (best[row.label].images_per_second or 0):
            best[row.label] = row
    lines = [f"failed: {label} ({'; '.join(loads)}): {reason}" for (label, reason), loads in reasons.items()]
    for row in sorted(best.values(), key=lambda row: -(row.images_per_second or 0)):
        lines.append(
            f"most images/s: {row.label}, {row.images_per_second:.1f} at batch {row.batch_size}, "
            f"{counted_requests(row.requests)}"
        )
    return lines


def counted_requests(requests: int) -> str:
    """Return the number of requests in words."""
    if requests == AUTO_REQUESTS:
        return "requests as the runtime recommends"
    return f"{requests} request{'' if requests == 1 else 's'}"


def run_settings(
    request: BenchmarkRequest, threads: int, source: str, batches: Mapping[str, np.ndarray]
) -> RunSettings:
    """Return how the engines are timed.

    Args:
        request: the request.
        threads: number of CPU threads.
        source: the data, or ``random``.
        batches: input name -> [batches, N, ...].
    """
    return RunSettings(
        threads=threads,
        batch_size=int(batches["image"].shape[1]),
        warmup=None if request.throughput else request.warmup,
        rounds=request.rounds,
        untimed_runs=UNTIMED_RUNS,
        seed=request.seed,
        input=source,
        input_shape=list(batches["image"].shape[1:]),
        limit=request.limit,
        peer=request.peer,
        peer_images=request.peer_images if request.peer else None,
        peer_max_drop=request.peer_max_drop if request.peer == "nncf_accuracy_control" else None,
        burst_seconds=request.burst_seconds if request.throughput else None,
    )


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Return the versions reported by all engines that ran, and of this package."""
    found: dict[str, str] = {}
    for run in runs:
        if run.worker is not None:
            found.update(run.worker.versions())
    return {**found, **versions()}


def _compared(model: BenchmarkedModel | None) -> ComparedModel | None:
    return None if model is None else ComparedModel(str(location(model)), model.bytes, model.content_hash())
