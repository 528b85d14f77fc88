"""The benchmark from two model folders to the table: ``deploy/benchmark.py``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.benchmark.plan import BenchmarkRequest, Candidate, Models, candidates
from act_pipeline.benchmark.record import benchmark_record, heading, remarks, run_settings
from act_pipeline.benchmark.rows import BenchmarkRecord
from act_pipeline.benchmark.runs import Run, closing, load
from act_pipeline.benchmark.table import benchmark_table, throughput_table
from act_pipeline.benchmark.throughput import Load, measure_loads, plan_loads
from act_pipeline.benchmark.timing import in_batches, rounds
from act_pipeline.benchmark.worker import WorkerFailed
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_file
from act_pipeline.core.progress import Progress
from act_pipeline.core.records import BENCHMARK_SCHEMA, write_record
from act_pipeline.engines import Machine, create_engine, machine
from act_pipeline.evaluation import evaluate
from act_pipeline.families.interface import PROMPTS

TIMED_IMAGES = 16

Say = Callable[[str], None]


@dataclass
class BenchmarkOutcome:
    """Result of a benchmark.

    Attributes:
        record: the settings and the rows, one per engine and precision; the content of ``benchmark.json``.
        lines: the text to print.
    """

    record: BenchmarkRecord
    lines: list[str] = field(default_factory=list)


def run_benchmark(
    request: BenchmarkRequest,
    say: Say = lambda line: print(line, file=sys.stderr),
    reader: Any = None,
    here: Machine | None = None,
    create: Any = create_engine,
) -> BenchmarkOutcome:
    """Time every engine and precision in interleaved rounds, and evaluate each.

    Every engine has its own process, and only one runs at a time. The time is measured in that process around
    ``engine.run``: copies to and from the runtime are included, reading and preprocessing are not. Each timed run
    follows two untimed ones. In every round all engines run once, on the same images, in a new random order. Ratios are
    the median over the rounds of the ratio within a round (``by_round``), which is printed; the record also has the
    ratio of the two medians (``of_p50``).

    With ``throughput`` each engine runs under load for some seconds in each round instead, and is not evaluated, see
    :func:`act_pipeline.benchmark.throughput.measure_loads`.

    Args:
        request: the request.
        say: is called with one line per step.
        reader: a reader; None to create it from ``request.reader_config``.
        here: this machine, or a substitute for tests.
        create: creates an engine in its process; must be picklable.

    Raises:
        UserError: nothing can run, or a requested file cannot be read or written.
    """
    request.check()
    for flag, example in (("json", "benchmark.json"), ("chart", "benchmark.png")):
        if getattr(request, flag) is not None:
            require_writable_file(getattr(request, flag), f"--{flag}", example)
    if request.peer is not None:
        from act_pipeline.benchmark.nncf_peer import require_nncf

        require_nncf()
    models = Models.of(request)
    here = here or machine()
    threads = request.cpu_threads or available_cpus()
    planned, notes = candidates(request, models, threads, here, create)
    notes = [note for note in (models.note, *notes) if note]
    loads = [Load(request.batch_size)]
    if request.throughput:
        loads, said = plan_loads(request, models, threads)
        notes += said
    largest = max(found.batch_size for found in loads)
    reader, images, source = _inputs(request, models, reader, largest)
    settings = run_settings(request, threads, source, in_batches(images, largest))
    with tempfile.TemporaryDirectory(prefix="act_pipeline_benchmark_") as scratch:
        if request.peer is not None:
            planned = [*planned, _peer(request, models, reader, threads, Path(scratch), say)]
        if request.throughput:
            measured, rows = measure_loads(planned, loads, request, images, Path(scratch), say)
            return _finish(request, benchmark_record(measured, models, here, settings, reader, notes, rows))
        inputs = Path(scratch) / "inputs.npz"
        np.savez(inputs, **in_batches(images, request.batch_size))
        runs = [Run(candidate, failure=candidate.refusal) for candidate in planned]
        with closing(runs):
            load(runs, inputs, say)
            _time(runs, request)
            if not request.no_map:
                _evaluate(runs, request, reader, say)
    if all(run.failure for run in runs):
        raise UserError("no engine could run: " + "; ".join(f"{run.label}: {run.failure}" for run in runs))
    return _finish(request, benchmark_record(runs, models, here, settings, reader, notes))


def _inputs(
    request: BenchmarkRequest, models: Models, reader: Any, largest: int
) -> tuple[Any, dict[str, np.ndarray], str]:
    """Return the reader (None if not needed), images ``name -> [N, ...]`` for the largest batch, and their source."""
    if not (request.random and not request.evaluated and request.peer is None):
        reader = _reader(request, models, reader)
    count = max(TIMED_IMAGES, largest)
    if request.random:
        return reader, _random_images(models, reader, count), "random"
    return reader, _first_images(reader, count), str(reader.path)


def _reader(request: BenchmarkRequest, models: Models, reader: Any) -> Any:
    try:
        if reader is None:
            from act_pipeline.data import Reader

            config = Path(request.reader_config) if request.reader_config else find_shipped(DEFAULT_READER)
            reader = Reader.load(config)
        if request.evaluated:
            reader.annotation_file("eval")
            if hasattr(reader, "require_labels"):
                reader.require_labels("eval", "the mAP")
    except UserError as error:
        raise UserError(f"{error}; or time on random input, without mAP: --random --no_map") from None
    size = models.input_size
    reader = reader if size is None or tuple(reader.input_size) == tuple(size) else reader.with_input_size(*size)
    model = models.float_ or models.int8
    if model is None:
        return reader
    return _fitted(model, reader) if request.evaluated else _with_constants(model, reader)


def _with_constants(model: Any, reader: Any) -> Any:
    """Return the reader with the model's constant inputs, without any check; substitutes for tests are unchanged."""
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import prompt_inputs, with_embeddings

    return with_embeddings(model, reader.with_constants(prompt_inputs(model))) if isinstance(reader, Reader) else reader


def _fitted(model: Any, reader: Any) -> Any:
    """Return the reader adapted to the model; substitutes for tests are returned unchanged."""
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import fit_reader, log_notes

    if not isinstance(reader, Reader):
        return reader
    fit = fit_reader(model, reader)
    log_notes(fit.notes)
    return fit.reader


def _first_images(reader: Any, count: int) -> dict[str, np.ndarray]:
    """Return the first ``count`` images of the eval split, repeated if there are fewer.

    They have no prompts, so that of a pair of models only the compared one is timed.
    """
    try:
        batch = next(iter(reader.loader("eval", batch_size=count, shuffle=False, drop_last=False)), None)
    except UserError as error:
        raise UserError(f"{error}; or time on random input, without mAP: --random --no_map") from None
    if not batch:
        raise UserError(
            f"{reader.annotation_file('eval')} gives no image, expected at least one; or time on random input, without "
            "mAP: --random --no_map"
        )
    return {name: np.resize(array, (count, *array.shape[1:])) for name, array in batch.items() if name != PROMPTS}


def _random_images(models: Models, reader: Any, count: int) -> dict[str, np.ndarray]:
    from act_pipeline.data.random_input import random_batch

    model = models.float_ or models.int8
    assert model is not None
    size = models.input_size or (tuple(reader.input_size) if reader is not None else None)
    if size is None:
        raise UserError("the model takes images of any size, so --random needs a --reader_config that says which")
    return random_batch(model, size, count)


def _peer(request: BenchmarkRequest, models: Models, reader: Any, threads: int, scratch: Path, say: Say) -> Candidate:
    from act_pipeline.benchmark.nncf_peer import nncf_candidate

    if not isinstance(models.float_, InferenceModel):
        raise UserError(f"--peer={request.peer} quantizes the FP32 model: give its folder as --model_path")
    folder = Path(request.work_dir) if request.work_dir else scratch
    max_drop = request.peer_max_drop if request.peer == "nncf_accuracy_control" else None
    return nncf_candidate(
        models.float_,
        reader,
        request.peer_images,
        threads=threads,
        batch_size=request.batch_size,
        folder=folder,
        say=say,
        max_drop=max_drop,
    )


def _time(runs: Sequence[Run], request: BenchmarkRequest) -> None:
    by_label = {run.label: run for run in runs if run.failure is None}
    for run in by_label.values():
        try:
            run.running.warm_up(request.warmup)
        except WorkerFailed as error:
            run.fail(error)
    order = rounds(list(by_label), request.rounds, request.seed)
    with Progress("time", "round", request.rounds) as bar:
        for index, labels in enumerate(order):
            for run in (by_label[label] for label in labels):
                if run.failure is None:
                    _timed_run(run, index)
            bar.update()
    for run in by_label.values():
        if run.failure is None:
            try:
                run.memory = run.running.memory()
            except WorkerFailed as error:
                run.fail(error)


def _timed_run(run: Run, index: int) -> None:
    try:
        timed = run.running.timed_run(index)
    except WorkerFailed as error:
        run.fail(error)
        return
    run.seconds.append(timed.seconds)
    run.unsettled += not timed.settled
    if timed.device_ms is not None:
        run.device_ms.append(float(timed.device_ms))


def _evaluate(runs: Sequence[Run], request: BenchmarkRequest, reader: Any, say: Say) -> None:
    for run in runs:
        if run.failure is not None:
            continue
        say(f"evaluating {run.label}")
        try:
            found = evaluate(run.running, reader, "eval", limit=request.limit, batch_size=request.batch_size)
        except (WorkerFailed, UserError) as error:
            # The timings remain valid; only the scores are missing.
            run.map_failure = str(error)
            if isinstance(error, WorkerFailed):
                run.running.kill()
            continue
        run.map, run.map50, run.miou, run.images = found.map, found.map50, found.miou, found.images


def _finish(request: BenchmarkRequest, record: BenchmarkRecord) -> BenchmarkOutcome:
    table = throughput_table(record) if request.throughput else benchmark_table(record)
    lines = [heading(record), "", table, "", *remarks(record)]
    if request.chart is not None:
        from act_pipeline.benchmark.chart import draw_chart, draw_throughput_chart

        (draw_throughput_chart if request.throughput else draw_chart)(record, request.chart)
        lines.append(f"chart: {request.chart}")
    if request.json is not None:
        write_record(request.json, BENCHMARK_SCHEMA, record.as_json())
        lines.append(f"record: {request.json}")
    return BenchmarkOutcome(record, lines)
