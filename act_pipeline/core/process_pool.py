"""Run units of work in this process, in several processes, or on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from act_pipeline.core.ray_cluster import run_on_ray
from act_pipeline.core.work import Work
from act_pipeline.core.worker_processes import run_in_processes

EXECUTORS = ("local", "ray")


def run_work(
    work: Work,
    units: Sequence[Any],
    executor: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
) -> Generator[Any, None, None]:
    """Run the function on all units and yield the results in the order of completion.

    Close the iterator (``contextlib.closing``) if it may not be read to its end; this kills its processes.

    Args:
        work: the function and its resources.
        units: its second arguments, one call each.
        executor: ``local`` or ``ray``.
        workers: number of units in parallel. ``local``: number of processes; 1 or None: this process. ``ray``: number
            of submitted units; None: twice as many as the cluster runs in parallel.
        ray_address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Returns:
        An iterator over the results.

    Raises:
        UserError: Ray is not installed, does not answer or has no machine that is large enough, a worker ended, or a
            session raised it.
    """
    if executor == "ray":
        return run_on_ray(work, units, workers, ray_address)
    if (workers or 1) > 1 and len(units) > 1:
        return run_in_processes(work, units, min(workers or 1, len(units)))
    return _here(work, units)


def _here(work: Work, units: Sequence[Any]) -> Generator[Any, None, None]:
    with contextlib.closing(work.open(work.shared)) as session:
        for unit in units:
            yield session(unit)
