"""Choice of the fastest engine that a machine can run."""

from __future__ import annotations

from act_pipeline.core.errors import UserError, suggest
from act_pipeline.engines.interface import PRECISIONS, EngineSupport
from act_pipeline.engines.machine import Machine, machine
from act_pipeline.engines.registry import REGISTRY, support

# Fastest first, as measured on RT-DETR and YOLOv8n on the CPU.
_ORDER = {
    "GPU": ("tensorrt", "paddle_trt", "onnxruntime", "paddle"),
    "CPU": ("openvino", "onnxruntime", "paddle_onednn", "paddle"),
}


def best_engine(
    precision: str, device: str = "CPU", here: Machine | None = None, onnx_file: bool = False
) -> tuple[str, str]:
    """Return the name of the fastest engine for a precision on a device, and the reason in one line.

    Args:
        precision: one of :data:`act_pipeline.engines.PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        here: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.
        onnx_file: the model is an ONNX file, which Paddle does not load.

    Returns:
        The engine's name and a one-line reason for users.

    Raises:
        UserError: the precision is unknown, or no engine here can run it; the message names what to install.

    Example:
        >>> best_engine("int8")  # doctest: +SKIP
        ('openvino', 'the fastest for int8 on the CPU (OpenVINO 2026.4.1, INT8 kernels ...)')
    """
    if precision not in PRECISIONS:
        near = suggest(precision, PRECISIONS)
        raise UserError(f"unknown precision {precision!r}, expected one of {', '.join(PRECISIONS)}{near}")
    found = {
        entry.engine: entry
        for entry in support(here or machine())
        if (entry.precision, entry.device) == (precision, device)
    }
    candidates = [found[name] for name in _ORDER[device] if name in found and (REGISTRY[name].onnx or not onnx_file)]
    if not candidates:
        can = sorted({entry.engine for entry in support(here) if entry.precision == precision})
        raise UserError(f"no engine has {precision} on the {device}; {', '.join(can) or 'none'} has it elsewhere")
    chosen = next((entry for entry in candidates if entry.available), None)
    if chosen is None:
        raise UserError(f"nothing here can run {precision} on the {device}: {_missing(candidates[0])}")
    faster = candidates[: candidates.index(chosen)]
    if not faster:
        return chosen.engine, f"the fastest for {precision} on the {device} ({chosen.why})"
    # The reason is one line, so only the fastest of the unavailable engines is named.
    return (
        chosen.engine,
        f"the fastest here for {precision} on the {device} ({chosen.why}); faster: {_missing(faster[0])}",
    )


def fastest_engine(
    precision: str, device: str = "auto", here: Machine | None = None, onnx_file: bool = False
) -> tuple[str, str, str]:
    """Return the fastest engine for a precision on this machine, its device, and the reason in one line.

    Args:
        precision: one of :data:`act_pipeline.engines.PRECISIONS`.
        device: ``CPU``, ``GPU``, or ``auto``: the GPU if there is one and an engine can use it, otherwise the CPU.
        here: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.
        onnx_file: the model is an ONNX file, which Paddle does not load.

    Returns:
        The engine's name, its device (``CPU`` or ``GPU``) and a one-line reason for users.

    Raises:
        UserError: as :func:`best_engine`.
    """
    here = here or machine()
    if device != "auto":
        name, why = best_engine(precision, device, here, onnx_file)
        return name, device, why
    idle = ""
    if here.gpus or here.nvidia_gpus:
        try:
            name, why = best_engine(precision, "GPU", here, onnx_file)
            return name, "GPU", why
        except UserError as error:
            idle = f"; not on the GPU: {error}"
    name, why = best_engine(precision, "CPU", here, onnx_file)
    return name, "CPU", why + idle


def _missing(entry: EngineSupport) -> str:
    return f"{entry.engine}, but {entry.why}; {entry.remedy}"
