"""Versions of what affects results, for records and cache keys."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

from act_pipeline.core.version import __version__

_RECORDED_PACKAGES = (
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddleslim",
    "paddledet",
    "numpy",
    "pycocotools",
    "opencv-python",
    "opencv-python-headless",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx-cu12",
)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, the platform and the installed packages that affect results."""
    found = {"act_pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
