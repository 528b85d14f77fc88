"""Measure the sensitivities of all ops in this process, in several processes, or on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from act_pipeline.analysis.ledger import Ledger
from act_pipeline.analysis.sensitivity import OpSensitivity, summarize
from act_pipeline.analysis.sensitivity_runner import SensitivityRunner
from act_pipeline.analysis.sensitivity_task import Task, Unit
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.process_pool import run_work
from act_pipeline.core.progress import each
from act_pipeline.core.work import Work

# Paddle's math libraries read these environment variables when they are loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Measurements = Generator[dict[str, Any], None, None]


def run_units(
    task: Task, units: Sequence[Unit], executor: str = "local", workers: int = 1, ray_address: str | None = None
) -> Measurements:
    """Measure units of a task and yield each measurement as soon as it is complete, in any order.

    Args:
        task: the task.
        units: elements of ``task.units``.
        executor: ``local`` or ``ray``.
        workers: number of processes; 1 for this process. Ignored on Ray, which measures as many units in parallel as
            fit.
        ray_address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        UserError: Ray is not installed or not reachable, a worker ended, or the outputs are not finite.
    """
    threads = str(max(available_cpus() // max(min(workers, len(units)), 1), 1))
    work = Work(
        SensitivityRunner,
        task,
        task.key,
        "the analysis",
        "--workers",
        "; what was measured is kept",
        dict.fromkeys(_THREAD_VARIABLES, threads),
    )
    return run_work(work, units, executor, None if executor == "ray" else workers, ray_address)


def measure_sensitivity(
    task: Task,
    ledger: Ledger | None = None,
    executor: str = "local",
    workers: int = 1,
    ray_address: str | None = None,
    progress: bool = True,
) -> list[OpSensitivity]:
    """Measure every op of a task, except for the units that a ledger already has.

    Args:
        task: the task, see :meth:`act_pipeline.analysis.sensitivity_task.Task.of`.
        ledger: stores each measurement as soon as it is complete; None to store nothing.
        executor, workers, ray_address: see :func:`run_units`.
        progress: show a progress bar on stderr.

    Returns:
        the sensitivities in the order of ``task.ops``.

    Raises:
        UserError: see :func:`run_units`.
    """
    wanted = set(task.units)
    kept = ledger.measurements if ledger is not None else []
    measurements = [found for found in kept if (found["op"], found["batch"]) in wanted]
    done = {(found["op"], found["batch"]) for found in measurements}
    units = [unit for unit in task.units if unit not in done]
    results: Iterable[dict[str, Any]] = ()
    with contextlib.ExitStack() as stack:
        if units:
            results = stack.enter_context(contextlib.closing(run_units(task, units, executor, workers, ray_address)))
        for found in each(results, "sensitivity", "op", len(task.units), done=len(done), shown=progress):
            measurements.append(found)
            if ledger is not None:
                ledger.add(found)
    return summarize(task.ops, measurements)
