"""Default paths of the commands: the built-in sample."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_MODELS = {"int8": Path("output/rtdetr_sample_int8"), "float": Path("output/rtdetr_sample")}
DEFAULT_READER = Path("configs/readers/sample_reader.yml")


def default_path(path: Path) -> Path:
    """Return a default path: relative to the current folder if it exists there, otherwise to the repository."""
    return path if path.exists() else REPOSITORY / path if (REPOSITORY / path).exists() else path
