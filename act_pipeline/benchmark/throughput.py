"""Images per second of every engine and precision under load: ``deploy/benchmark.py --throughput``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.benchmark.nncf_peer import LABELS as PEER_LABELS
from act_pipeline.benchmark.plan import BenchmarkRequest, Candidate, Models
from act_pipeline.benchmark.record import counted_requests
from act_pipeline.benchmark.rows import LoadRow, SpeedRatio
from act_pipeline.benchmark.runs import Run, closing, load
from act_pipeline.benchmark.timing import in_batches, rounds, speed_ratio
from act_pipeline.benchmark.worker import WorkerFailed
from act_pipeline.core.errors import UserError
from act_pipeline.core.progress import Progress
from act_pipeline.engines.registry import find_runtime
from act_pipeline.evaluation.batches import mean_and_percentiles

BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Load:
    """What an engine computes at a time.

    Attributes:
        batch_size: images per run.
        requests: number of parallel requests; ``AUTO_REQUESTS``: as many as the runtime recommends.
    """

    batch_size: int
    requests: int = 1


def plan_loads(request: BenchmarkRequest, models: Models, threads: int) -> tuple[list[Load], list[str]]:
    """Return the loads to measure, and notes on what was left out.

    Args:
        request: the request.
        models: the models; if their batch is fixed, this is the only size.
        threads: number of CPU threads.
    """
    batches = request.batches or BATCHES
    notes = []
    fixed = models.fixed_batch
    if fixed is not None:
        batches = (fixed,)
        notes.append(f"the model's batch is fixed: measured at {fixed} only; for others, export it for any batch")
    requests = request.requests or default_requests(threads)
    return [Load(size, number) for size in batches for number in requests], notes


def default_requests(threads: int) -> tuple[int, ...]:
    """Return the numbers of requests to measure for a number of CPU threads: 1 to twice as many."""
    return tuple(sorted({1, max(1, threads // 4), max(1, threads // 2), threads, 2 * threads}))


def measure_loads(
    planned: Sequence[Candidate],
    loads: Sequence[Load],
    request: BenchmarkRequest,
    images: Mapping[str, np.ndarray],
    scratch: Path,
    say: Callable[[str], None],
) -> tuple[list[Run], list[LoadRow]]:
    """Measure every engine under every load.

    As for latencies, every engine has its own process, and only one runs at a time. For each load, every round runs all
    engines in a random order, each for ``burst_seconds``: its requests run in parallel, and each starts its next batch
    when its last one has ended. Ratios are between engines under the same load, as medians over the rounds.

    Args:
        planned: the engines; those that run one request at a time are measured with one only.
        loads: the loads.
        request: rounds, seconds and seed.
        images: the inputs, ``name -> [N, ...]``, N at least the largest batch size.
        scratch: an existing folder for the batches.
        say: is called with one line per step.

    Returns:
        The runs of the last load in which each engine ran, for their versions; and a row for each engine and load,
        ordered by load, within it the fastest first.

    Raises:
        UserError: no engine could run under any load.
    """
    runs_of = [(each, _runs(planned, each)) for each in loads]
    runs_of = [(each, runs) for each, runs in runs_of if runs]
    rows: list[LoadRow] = []
    last: dict[str, Run] = {}
    with Progress("time", "round", request.rounds * len(runs_of)) as bar:
        for each, runs in runs_of:
            inputs = scratch / f"inputs_{each.batch_size}.npz"
            if not inputs.exists():
                np.savez(inputs, **in_batches(images, each.batch_size))
            with closing(runs):
                say(f"batch {each.batch_size}, {counted_requests(each.requests)}")
                load(runs, inputs, say, twice=False)
                for labels in rounds([run.label for run in runs], request.rounds, request.seed):
                    for run in (run for label in labels for run in runs if run.label == label):
                        _timed_burst(run, request.burst_seconds)
                    bar.update()
                rows += sorted(_rows(runs, each), key=lambda row: -(row.images_per_second or 0))
            last.update({run.label: run for run in runs if run.failure is None})
    if not last:
        raise UserError("no engine could run: " + "; ".join(f"{row.label}: {row.failure}" for row in rows))
    return list(last.values()), rows


def _runs(planned: Sequence[Candidate], each: Load) -> list[Run]:
    """Return the runs of the engines that can have a load."""
    runs = []
    for candidate in planned:
        several = find_runtime(candidate.engine).requests
        if each.requests != 1 and not several:
            continue
        create: Any = candidate.create
        if create is not None:
            options = {"requests": each.requests} if several else {}
            create = functools.partial(create, batch_size=each.batch_size, **options)
        runs.append(Run(replace(candidate, create=create), failure=candidate.refusal))
    return runs


def _timed_burst(run: Run, seconds: float) -> None:
    if run.failure is not None:
        return
    try:
        run.bursts.append(run.running.timed_burst(seconds))
    except WorkerFailed as error:
        run.fail(error)


def _rows(runs: Sequence[Run], each: Load) -> list[LoadRow]:
    measured = {run.label: run for run in runs if run.failure is None and run.bursts}
    peer = next((measured[label] for label in PEER_LABELS.values() if label in measured), None)
    rows = []
    for run in runs:
        candidate = run.candidate
        row = LoadRow(run.label, candidate.engine, candidate.precision, each.batch_size, each.requests, run.failure)
        if run.label in measured:
            rates = [burst.images_per_second for burst in run.bursts]
            seconds = [taken for burst in run.bursts for taken in burst.latencies]
            loaded = run.running.loaded
            assert loaded is not None, f"{run.label} ran without being loaded"
            row = replace(
                row,
                requests=loaded.requests,
                settings=loaded.settings,
                images_per_second=round(float(np.median(rates)), 3),
                rates=[round(rate, 4) for rate in rates],
                latency_ms=mean_and_percentiles(seconds),
                runs=len(seconds),
                ratio_to_fp32=_ratio(run, measured.get(f"{candidate.engine} fp32")),
                ratio_to_peer=_ratio(run, peer),
            )
        rows.append(row)
    return rows


def _ratio(run: Run, baseline: Run | None) -> SpeedRatio | None:
    """Return the speed-up over a baseline, of the duration per image."""
    if baseline is None:
        return None
    theirs, ours = ([1 / burst.images_per_second for burst in found.bursts] for found in (baseline, run))
    return speed_ratio(theirs, ours, baseline.label)
