"""Selection of the device that Paddle computes on."""

from __future__ import annotations

from act_pipeline.core.errors import UserError


def choose_device(device: str) -> str:
    """Return the device to use, ``CPU`` or ``GPU``.

    Args:
        device: ``auto`` (the GPU if Paddle finds one), ``cpu`` or ``gpu``, in any case.

    Raises:
        UserError: the value is unknown, or ``gpu`` is requested and Paddle finds no GPU.
    """
    import paddle

    wanted = device.upper()
    if wanted not in ("AUTO", "CPU", "GPU"):
        raise UserError(f"device is '{device}', expected auto, cpu or gpu")
    found = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if wanted == "GPU" and not found:
        reason = "this machine has no GPU" if paddle.is_compiled_with_cuda() else "paddlepaddle is the CPU package"
        raise UserError(
            f"no GPU can be used: {reason}; use --devices=cpu, or install requirements/gpu.txt on a GPU machine"
        )
    return "GPU" if wanted != "CPU" and found else "CPU"
