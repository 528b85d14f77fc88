"""Tests in several processes (pytest-xdist): shared fixtures, and tests that run alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def together() -> bool:
    """Return whether this is one of several processes that share the tests."""
    return "PYTEST_XDIST_WORKER" in os.environ


def keep_to_own_cores() -> None:
    """Bind each process to its own cores, before any runtime counts them.

    Paddle's and OpenVINO's threads synchronize within every op: two processes with two threads each on two cores would
    wait for threads that are not running.
    """
    if together() and hasattr(os, "sched_setaffinity"):
        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number % len(cores) :: count])


def common_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of a run, which its processes share."""
    folder = factory.getbasetemp()
    return folder.parent if together() else folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """Return the result of ``make`` for a new folder, computed by the first process and shared with all others.

    Args:
        factory: creates temporary folders.
        name: name of the folder.
        make: called in one process; its result is pickled for the others.
    """
    folder = common_folder(factory) / name
    kept = folder.with_suffix(".pickle")
    with _locked(folder.with_suffix(".lock"), fcntl.LOCK_EX):
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())


@contextlib.contextmanager
def a_turn(factory: pytest.TempPathFactory, alone: bool) -> Iterator[None]:
    """Allow tests to run in parallel, except that one with ``alone`` waits for the others and blocks new ones."""
    if not together():
        yield
        return
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with contextlib.ExitStack() as stack:
        # A test that runs alone holds the door lock, so that no other starts while it waits for running ones to end.
        with _locked(common_folder(factory) / "door.lock", kind):
            stack.enter_context(_locked(common_folder(factory) / "room.lock", kind))
        yield


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:  # a child process forked by a test may still have the file open
            fcntl.flock(file, fcntl.LOCK_UN)
