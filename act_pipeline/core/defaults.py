"""What comes with the package (the configs), and what commands take where nothing is named: the built-in sample."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# `setup.py` puts the configs and the locks of the repository into the installed package.
INSTALLED = (_PACKAGE / "configs").is_dir()
CONFIGS = _PACKAGE / "configs" if INSTALLED else _PACKAGE.parent / "configs"
# The locks of environments that commands make, and the script that makes them.
REQUIREMENTS = _PACKAGE / "requirements" if INSTALLED else _PACKAGE.parent / "requirements"
DEFAULT_MODELS = {"int8": Path("output/rtdetr_sample_int8"), "float": Path("output/rtdetr_sample")}
DEFAULT_CONFIG = Path("configs/sample.yml")
DEFAULT_READER = Path("configs/readers/sample_reader.yml")


def find_shipped(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` where it is there, else the file of that name in this repository or in the installed package.

    A repository is looked through as a whole (``configs/...``, ``output/...``), an installed package for
    ``configs/...`` alone. If there is none anywhere, the path as it was given.
    """
    given = Path(path)
    if os.path.exists(given) or (INSTALLED and given.parts[:1] != ("configs",)):
        return given
    shipped = CONFIGS.parent / given
    return shipped if os.path.exists(shipped) else given
