"""Memory of trainings and evaluations, each in its own process (`memory_runs`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# A detection is a row of seven float64 when stored, and a dict in pycocotools while it is scored.
BYTES_A_DETECTION = 2048
MIB = 1 << 20

pytestmark = pytest.mark.slow


def run(kind: str, folder: Path, *number: int) -> dict:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "tests" / "memory_runs.py"), kind, str(folder), *map(str, number)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_of_a_thousand_iterations_does_not_grow(tmp_path: Path) -> None:
    """If each batch (192 KiB) leaked, 800 more would take 150 MiB; a leaked checkpoint or evaluation also counts."""
    held = {int(given): held for given, held in run("train", tmp_path / "run", 1000)["held"].items()}
    assert held[1000] - held[200] < 20, held


def test_the_peak_of_an_evaluation_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """Except for the stored detections, 100 per image; if the images leaked, 180 more would take 840 MiB."""
    few, many = (run("evaluate", tmp_path / str(images), images)["peak"] for images in (20, 200))
    assert many - few < 180 * 100 * BYTES_A_DETECTION / MIB + 20, (few, many)


def test_compressing_takes_at_most_twice_the_memory_of_a_float_training(demo, tmp_path: Path) -> None:
    """Peaks of whole processes, with interpreter and libraries; the float training is `memory_runs.train_float`."""
    folder = tmp_path / "sample"
    folder.mkdir()
    for name in ("data", "output"):
        (folder / name).symlink_to(demo.root / name)
    plain, compressed = run("float", folder)["peak"], run("compress", folder)["peak"]
    assert compressed <= 2 * plain, (plain, compressed)
