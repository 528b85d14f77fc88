"""The device that Paddle computes on."""

from __future__ import annotations

from act_pipeline.core.errors import UserError


def choose_device(device: str) -> str:
    """Return ``CPU`` or ``GPU`` for ``auto``, ``cpu`` or ``gpu``.

    Raises:
        UserError: a GPU is asked for that Paddle does not find.
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
