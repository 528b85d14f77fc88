"""`make lint` finds nothing: ruff's rules, ruff's format, and mypy's types."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "mypy"])
def test_nothing_to_mend(tool: str) -> None:
    module = tool.split()[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; `make test` installs it from requirements/dev.txt")
    planned = subprocess.run(
        ["make", "-n", "lint", f"VENV_PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (command,) = [line for line in planned.splitlines() if f" -m {tool}" in line]
    ended = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
