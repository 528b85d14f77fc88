"""Finds the package for the scripts in this folder: the one of this clone, whether one is installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from act_pipeline.cli.main import run_module  # noqa: E402, F401
