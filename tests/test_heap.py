"""What a training takes from the system's memory: kept while it runs, and taken before it is needed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inference_fixtures import export_tiny_model

from act_pipeline.execution import memory
from act_pipeline.graph.model_files import ModelSummary, inspect_model

REPOSITORY = Path(__file__).resolve().parents[1]
TAKEN = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[1])
from act_pipeline.execution.memory import TakenAhead, freed_memory_kept
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept("CPU"):
    taken = TakenAhead(200 << 20)
    taken.thread.join()
    libc.malloc_trim(0)
    taken.close()
    print(faults())
"""


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="for glibc")
def test_memory_that_was_taken_ahead_has_its_pages() -> None:
    run = [sys.executable, "-c", TAKEN, str(REPOSITORY)]
    faults = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    release = [int(part) for part in re.findall(r"\d+", os.uname().release)[:2]]
    assert faults < 2000 or release < [5, 14]  # of 40,960 pages


def test_no_more_than_half_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: (100 << 20) // memory.mmap.PAGESIZE)
    with contextlib.closing(memory.TakenAhead(1 << 40)) as taken:
        assert len(taken._blocks) == 3  # of 16 MiB


def test_it_stops_at_once_when_the_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    libc, pieces = memory._glibc(), []

    class Slow:
        malloc, free = libc.malloc, libc.free

        def madvise(self, at: int, size: int, advice: int) -> int:
            pieces.append(size)
            time.sleep(0.05)
            return 0

    monkeypatch.setattr(memory, "_glibc", Slow)
    taken = memory.TakenAhead(160 << 20)
    taken.close()
    assert len(pieces) < 3 and not taken._blocks and not taken.thread.is_alive()
    taken.close()


def test_nothing_is_taken_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with memory.freed_memory_kept("CPU"), contextlib.closing(memory.TakenAhead(1 << 30)) as taken:
        assert not taken._blocks


def test_activations_are_counted_by_the_batch(tmp_path: Path) -> None:
    summary = inspect_model(export_tiny_model(tmp_path / "model", quantized=True))
    assert not set(summary.activations) & set(summary.parameters) and set(summary.inputs) < set(summary.activations)
    counted = ModelSummary({}, (), {}, {}, activations={"a": (-1, 3, 4), "b": (5,), "c": (), "d": (-1, -1, 2)})
    assert [counted.activation_bytes(size) for size in (1, 2)] == [4 * (12 + 5 + 1 + 2), 4 * (24 + 5 + 1 + 4)]
