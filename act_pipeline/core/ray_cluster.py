"""Work on units on a Ray cluster."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from act_pipeline.core.errors import UserError
from act_pipeline.core.work import Session, Work

# Units submitted to Ray, for each that it can run in parallel.
_AHEAD = 2
# Attempts for a unit that is lost with a machine or killed for memory; Ray's own retries for memory are unlimited.
_TRIES = 3
_RAY_SECONDS = 5.0


def run_on_ray(
    work: Work, units: Sequence[Any], workers: int | None, address: str | None
) -> Generator[Any, None, None]:
    """Work on units on a Ray cluster, and yield the results in the order of completion.

    Args:
        work: the work.
        units: its units.
        workers: the number of submitted units; None: twice as many as the cluster runs in parallel.
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``.

    Raises:
        UserError: Ray is not installed, does not answer or has no machine that is large enough, or a unit failed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--executor ray needs the package ray, which cannot be imported ({error}); "
            "pip install 'act_pipeline[ray]', or leave --executor out to run on this machine"
        ) from None
    if not address:
        raise UserError(
            "--executor ray needs the address of a cluster: --ray_address auto on a machine of the cluster, or "
            "--ray_address ray://HOST:10001 from elsewhere"
        )
    try:
        _require_answer(address)
        # Ray copies this package to the cluster; Paddle must be installed there.
        package = Path(__file__).resolve().parents[1]
        ray.init(address=address, runtime_env={"py_modules": [str(package)]}, log_to_driver=False)
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and its own classes
        raise UserError(
            f"no Ray cluster answers at --ray_address {address}: {_line(error)}; start one with 'ray start --head'"
        ) from None
    try:
        yield from _with_ray(ray, work, units, workers)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise an OSError if nothing listens at the address: Ray itself retries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_RAY_SECONDS).close()


def _with_ray(ray: Any, work: Work, units: Sequence[Any], workers: int | None) -> Iterator[Any]:
    room = _room(ray, work)
    at_a_time = workers or room * _AHEAD
    options: dict[str, Any] = {
        "num_cpus": work.cpus,
        "max_retries": 0,
        **({"num_gpus": work.gpus} if work.gpus else {}),
    }
    remote: Callable[..., Any] = ray.remote(**options)(_do).remote
    shared = ray.put(work)
    left = [(unit, 1) for unit in reversed(units)]
    waiting: dict[Any, tuple[Any, int]] = {}
    while left or waiting:
        while left and len(waiting) < at_a_time:
            unit, attempt = left.pop()
            waiting[remote(shared, unit)] = unit, attempt
        done, _ = ray.wait(list(waiting), num_returns=1)
        for reference in done:
            unit, attempt = waiting.pop(reference)
            try:
                result = ray.get(reference)
            except Exception as error:  # errors of a task are wrapped; a lost machine raises one of many classes
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise cause from None
                if cause is None and attempt < _TRIES:
                    left.append((unit, attempt + 1))
                    continue
                raise UserError(
                    f"a unit of {work.name} failed on the Ray cluster: {_line(error)}; run it again{work.kept}"
                ) from error
            yield result


def _room(ray: Any, work: Work) -> int:
    """Return how many units the cluster can run in parallel, at least 1: Ray would wait forever for resources."""
    room = 0
    for node in ray.nodes():
        has = node.get("Resources", {}) if node.get("Alive") else {}
        fit = int(has.get("CPU", 0)) // work.cpus
        room += min(fit, int(has.get("GPU", 0)) // work.gpus) if work.gpus else fit
    if not room:
        needed = f"{work.cpus} CPUs" + (f" and {work.gpus} GPU" if work.gpus else "")
        raise UserError(
            f"no machine of the Ray cluster has the {needed} that one unit of {work.name} takes; start one that has "
            "them, or ask for fewer"
        )
    return room


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _do(work: Work, unit: Any) -> Any:
    return _session_of(work)(unit)


@functools.lru_cache(maxsize=1)
def _session_of(work: Work) -> Session:
    """Return the session of a work, the same for all of its units that Ray runs in this process."""
    return work.open(work.shared)
