"""What a training takes from the system's memory: kept while it runs, and taken before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from inference_fixtures import export_tiny_model

from act_pipeline.compress import heap
from act_pipeline.engines.model_files import ModelSummary, inspect_model

REPOSITORY = Path(__file__).resolve().parents[1]
TAKEN = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[1])
from act_pipeline.compress.heap import freed_memory_kept, take_ahead
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept("CPU"):
    thread = take_ahead(200 << 20)
    if thread is not None:
        thread.join()
    print(faults(), thread is not None)
"""


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="for glibc")
def test_memory_that_was_taken_ahead_has_its_pages() -> None:
    run = [sys.executable, "-c", TAKEN, str(REPOSITORY)]
    faults, taken = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert taken == "True"
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (5, 14):
        assert int(faults) < 2000  # of 40,960 pages


def test_no_more_than_half_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list] = []
    monkeypatch.setattr(heap, "_populate", lambda libc, blocks: taken.append(blocks) or [libc.free(at) for at in blocks])
    monkeypatch.setattr(os, "sysconf", lambda name: (100 << 20) // heap.mmap.PAGESIZE)
    heap.take_ahead(1 << 40).join()
    assert len(taken[0]) == 3  # of 16 MiB


def test_nothing_is_taken_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert heap.take_ahead(1 << 30) is None
    with heap.freed_memory_kept("CPU"):
        pass


def test_activations_are_counted_by_the_batch(tmp_path: Path) -> None:
    summary = inspect_model(export_tiny_model(tmp_path / "model", quantized=True))
    assert not set(summary.activations) & set(summary.parameters) and set(summary.inputs) < set(summary.activations)
    counted = ModelSummary({}, (), {}, {}, activations={"a": (-1, 3, 4), "b": (5,), "c": (), "d": (-1, -1, 2)})
    assert [counted.activation_bytes(size) for size in (1, 2)] == [4 * (12 + 5 + 1 + 2), 4 * (24 + 5 + 1 + 4)]
