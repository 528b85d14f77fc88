"""The sensitivities of all ops, measured in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from act_pipeline.analysis.ledger import Ledger
from act_pipeline.analysis.sensitivity import OpSensitivity, SensitivityRunner, Task, Unit, summarize
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.process_pool import Work, run_work

# Paddle's math libraries read them when they are loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Measurements = Generator[dict[str, Any], None, None]


def run_units(
    task: Task, units: Sequence[Unit], executor: str = "local", workers: int = 1, ray_address: str | None = None
) -> Measurements:
    """Measure units of a task and yield the measurements as they come, in any order.

    Args:
        task: the task.
        units: of ``task.units``.
        executor: ``local`` or ``ray``.
        workers: processes; 1: this one. Without meaning on Ray, where as many units are measured as fit.
        ray_address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        UserError: Ray is not installed or does not answer, a worker ended, or the outputs are not finite.
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
    """Measure every op of a task, less what a ledger holds already.

    Args:
        task: :meth:`act_pipeline.analysis.sensitivity.Task.of` makes it.
        ledger: keeps each measurement as it comes; None: nothing is kept.
        executor, workers, ray_address: as :func:`run_units` takes them.
        progress: show a progress bar on stderr.

    Returns:
        in the order of ``task.ops``.

    Raises:
        UserError: as :func:`run_units`.
    """
    from tqdm import tqdm

    wanted = set(task.units)
    kept = ledger.measurements if ledger is not None else []
    measurements = [found for found in kept if (found["op"], found["batch"]) in wanted]
    done = {(found["op"], found["batch"]) for found in measurements}
    units = [unit for unit in task.units if unit not in done]
    results: Iterable[dict[str, Any]] = ()
    with contextlib.ExitStack() as stack:
        if units:
            results = stack.enter_context(contextlib.closing(run_units(task, units, executor, workers, ray_address)))
        for found in tqdm(
            results,
            total=len(task.units),
            initial=len(done),
            desc="sensitivity",
            unit="op",
            disable=not progress,
            leave=False,
        ):
            measurements.append(found)
            if ledger is not None:
                ledger.add(found)
    return summarize(task.ops, measurements)
