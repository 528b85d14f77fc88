"""TensorRT from Q/DQ ONNX: not written yet."""

from __future__ import annotations

from typing import Any

from act_pipeline.engines.host import Machine
from act_pipeline.errors import UserError

_WHY, _REMEDY = "this version has no TensorRT engine of its own yet", "run with --engine=auto"


def tensorrt_refusal(here: Machine) -> tuple[str, str] | None:
    """Return why TensorRT cannot run here, and what to do; None if it can."""
    return _WHY, _REMEDY


def tensorrt_versions() -> str:
    """Return the versions of TensorRT."""
    return ""


class TensorRTEngine:
    """An :class:`act_pipeline.engines.base.Engine`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise UserError(f"{_WHY}; {_REMEDY}")
