"""Tests in several processes (pytest-xdist): what these make together, and what runs while nothing else does."""

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
    """Say whether this is one of several processes that share the tests."""
    return "PYTEST_XDIST_WORKER" in os.environ


def keep_to_own_cores() -> None:
    """Let each process have cores of its own, before any runtime counts them.

    Paddle's and OpenVINO's threads wait for each other within every op: with two threads each on two cores, two
    processes would wait for threads that do not run.
    """
    if together() and hasattr(os, "sched_setaffinity"):
        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number % len(cores) :: count])


def common_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of a run; its processes share it."""
    folder = factory.getbasetemp()
    return folder.parent if together() else folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """Return what ``make`` gives for a new folder, in all processes the same: the first makes it, the others wait.

    Args:
        factory: of temporary folders.
        name: of the folder.
        make: called in one process; what it returns is pickled for the others.
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
    """Let tests run side by side, and one with ``alone`` when those have ended and before others start."""
    if not together():
        yield
        return
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with contextlib.ExitStack() as stack:
        # Who wants to be alone holds the door, so that nobody enters while it waits for the room to be empty.
        with _locked(common_folder(factory) / "door.lock", kind):
            stack.enter_context(_locked(common_folder(factory) / "room.lock", kind))
        yield


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:  # a child that a test forked may still have the file
            fcntl.flock(file, fcntl.LOCK_UN)
