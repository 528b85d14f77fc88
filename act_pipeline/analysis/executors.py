"""Where sensitivities are measured: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Optional

from act_pipeline.analysis.ledger import Ledger
from act_pipeline.analysis.sensitivity import OpSensitivity, Task, Unit, measure, release, summarize
from act_pipeline.engines.base import available_cpus
from act_pipeline.errors import UserError

EXECUTORS = ("local", "ray")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Units handed to Ray ahead of the results, for each of its CPUs.
_AHEAD = 2
Measurements = Iterator[dict[str, Any]]


def run_units(
    task: Task, units: Sequence[Unit], executor: str = "local", workers: int = 1, ray_address: str | None = None
) -> Measurements:
    """Measure units of a task and yield the measurements as they come, in any order.

    Args:
        task: the task.
        units: of ``task.units``.
        executor: ``local`` or ``ray``.
        workers: processes; 1: this one. On Ray: how many units are measured at a time, at least one a CPU.
        ray_address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        UserError: Ray is not installed or does not answer, a worker ended, or the outputs are not finite.
    """
    if executor == "ray":
        return _on_ray(task, units, workers, ray_address)
    if workers > 1 and len(units) > 1:
        return _in_processes(task, units, min(workers, len(units)))
    return _here(task, units)


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
    results = run_units(task, units, executor, workers, ray_address) if units else iter(())
    with contextlib.closing(results) if units else contextlib.nullcontext():
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


def _here(task: Task, units: Sequence[Unit]) -> Measurements:
    try:
        for unit in units:
            yield measure(task, unit)
    finally:
        release()


_task: Optional[Task] = None


def _adopt(task: Task) -> None:
    global _task
    _task = task


def _measure_adopted(unit: Unit) -> dict[str, Any]:
    assert _task is not None
    return measure(_task, unit)


def _in_processes(task: Task, units: Sequence[Unit], workers: int) -> Measurements:
    # Spawned: a fork of a process that has run Paddle hangs in its thread pools.
    context = multiprocessing.get_context("spawn")
    with _threads_for_each(workers), ProcessPoolExecutor(workers, context, _adopt, (task,)) as pool:
        futures = [pool.submit(_measure_adopted, unit) for unit in units]
        try:
            yield from _results(futures)
        except BrokenProcessPool:
            raise UserError(
                "a worker of the analysis ended without a word, most likely for want of memory; run it again with fewer "
                "--workers: what was measured is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(futures: Sequence[Any]) -> Measurements:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextlib.contextmanager
def _threads_for_each(workers: int) -> Iterator[None]:
    """Share the CPUs: Paddle's math libraries read these variables when they are loaded, in the new process."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(max(available_cpus() // workers, 1))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _on_ray(task: Task, units: Sequence[Unit], workers: int, address: str | None) -> Measurements:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--executor ray needs the package ray, which cannot be imported ({error}); "
            "pip install 'act_pipeline[ray]', or leave --executor out to measure on this machine"
        ) from None
    if not address:
        raise UserError(
            "--executor ray needs the address of a cluster: --ray_address auto on a machine of the cluster, or "
            "--ray_address ray://HOST:10001 from elsewhere"
        )
    try:
        # The package travels with the task; Paddle must be installed on the cluster.
        package = Path(__file__).resolve().parents[1]
        ray.init(address=address, runtime_env={"py_modules": [str(package)]}, log_to_driver=False)
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and classes of its own
        raise UserError(
            f"no Ray cluster answers at --ray_address {address}: {_line(error)}; start one with 'ray start --head'"
        ) from None
    try:
        yield from _with_ray(ray, task, units, workers)
    finally:
        ray.shutdown()


def _with_ray(ray: Any, task: Task, units: Sequence[Unit], workers: int) -> Measurements:
    remote: Callable[..., Any] = ray.remote(num_cpus=1)(measure).remote
    shared = ray.put(task)
    ahead = max(workers, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
    left = list(reversed(units))
    waiting: list[Any] = []
    while left or waiting:
        while left and len(waiting) < ahead:
            waiting.append(remote(shared, left.pop()))
        done, waiting = ray.wait(waiting, num_returns=1)
        for reference in done:
            try:
                yield ray.get(reference)
            except Exception as error:  # a task's own error comes wrapped, a lost machine as one of many classes
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise cause from None
                raise UserError(
                    f"a unit of the analysis failed on the Ray cluster: {_line(error)}; run it again: what was measured "
                    "is kept"
                ) from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
