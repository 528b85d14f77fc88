"""Resolution of the device, ``CPU`` or ``GPU``, that Paddle or an inference engine computes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import EngineSupport, runtime_error_line


def paddle_device(device: str) -> str:
    """Return the device that Paddle computes on, for calibration, analysis and training: ``CPU`` or ``GPU``.

    Args:
        device: ``auto`` (the GPU if Paddle finds one), ``cpu`` or ``gpu``, in any case.

    Raises:
        UserError: the value is unknown, or ``gpu`` is requested and Paddle finds no GPU.
    """
    import paddle

    wanted = device.upper()
    if wanted not in ("AUTO", "CPU", "GPU"):
        raise UserError(f"device is '{device}', expected auto, cpu or gpu")
    if wanted == "CPU":
        return "CPU"
    with_cuda = paddle.is_compiled_with_cuda()
    if with_cuda and paddle_gpus(paddle)[0]:
        return "GPU"
    if wanted == "GPU":
        reason = "this machine has no GPU" if with_cuda else "paddlepaddle is the CPU package"
        raise UserError(
            f"no GPU can be used: {reason}; use --devices=cpu, or install requirements/gpu.txt on a GPU machine"
        )
    return "CPU"


def paddle_gpus(paddle: Any) -> tuple[tuple[str, ...], str]:
    """Return the names of the GPUs that Paddle can use, and why there are none; empty if there are.

    Args:
        paddle: the module, compiled with CUDA.
    """
    cuda = paddle.device.cuda
    try:
        names = tuple(cuda.get_device_properties(index).name for index in range(cuda.device_count()))
    except Exception as error:  # no driver, a driver too old
        return (), runtime_error_line(error)
    return names, "" if names else "Paddle sees no NVIDIA GPU (no device, or no driver)"


def engine_device(device: str, entries: Iterable[EngineSupport]) -> str:
    """Return the device for inference engines, ``CPU`` or ``GPU``.

    Args:
        device: ``CPU``, ``GPU``, or ``auto``: the GPU if an engine can use one.
        entries: what the engines in question can do, see :func:`act_pipeline.engines.support`.
    """
    if device != "auto":
        return device
    return "GPU" if any(entry.available and entry.device == "GPU" for entry in entries) else "CPU"
