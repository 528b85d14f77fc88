"""What this machine and this installation have: asked here, and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from act_pipeline.engines.base import available_cpus, runtime_error_line


@dataclass(frozen=True)
class Machine:
    """The processor, the accelerators and what Paddle was built with.

    Attributes:
        cpu: the processor's name.
        cores: CPUs this process may use.
        avx512_vnni: the CPU has 8-bit dot products; None if the system does not say.
        gpus: names of the GPUs that Paddle can use.
        paddle: version of Paddle, None if it is not installed.
        paddle_onednn: Paddle was built with oneDNN.
        cuda: CUDA version that Paddle was built for, None for the CPU package.
        cudnn: cuDNN version that Paddle was built for.
        tensorrt_compiled: (major, minor, patch) that Paddle was built with.
        tensorrt_runtime: (major, minor, patch) of the libnvinfer that was found.
        absent: attribute name -> why it is None or empty.
    """

    cpu: str
    cores: int
    avx512_vnni: bool | None
    gpus: tuple[str, ...] = ()
    paddle: str | None = None
    paddle_onednn: bool = False
    cuda: str | None = None
    cudnn: str | None = None
    tensorrt_compiled: tuple[int, ...] | None = None
    tensorrt_runtime: tuple[int, ...] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)


@functools.lru_cache(maxsize=1)
def machine() -> Machine:
    """Look once; imports Paddle if it is installed."""
    cpu, vnni = _cpu()
    found: dict[str, object] = {"cpu": cpu, "cores": available_cpus(), "avx512_vnni": vnni}
    absent: dict[str, str] = {}
    if vnni is None:
        absent["avx512_vnni"] = "the system does not list the CPU's flags"
    try:
        import paddle
        from paddle import inference
        from paddle.base import core
    except Exception as error:  # a broken wheel raises anything from ImportError to OSError
        absent["paddle"] = f"paddlepaddle cannot be imported: {runtime_error_line(error)}"
        for name in ("gpus", "cuda", "cudnn", "tensorrt_compiled", "tensorrt_runtime"):
            absent[name] = absent["paddle"]
        return Machine(**found, absent=absent)  # type: ignore[arg-type]
    found["paddle"] = paddle.__version__
    # `core` is internal to Paddle; 2.6 has no public question for oneDNN.
    found["paddle_onednn"] = bool(getattr(core, "is_compiled_with_mkldnn", lambda: False)())
    if not paddle.is_compiled_with_cuda():
        why = f"paddlepaddle {paddle.__version__} is the CPU package"
        absent.update(dict.fromkeys(("gpus", "cuda", "cudnn", "tensorrt_compiled", "tensorrt_runtime"), why))
        return Machine(**found, absent=absent)  # type: ignore[arg-type]
    found["cuda"], found["cudnn"] = str(paddle.version.cuda()), str(paddle.version.cudnn())
    found["gpus"], absent["gpus"] = _gpus(paddle)
    compiled = tuple(inference.get_trt_compile_version())
    found["tensorrt_compiled"] = compiled if any(compiled) else None
    if not any(compiled):
        absent["tensorrt_compiled"] = f"paddlepaddle-gpu {paddle.__version__} was built without TensorRT"
        absent["tensorrt_runtime"] = absent["tensorrt_compiled"]
        return Machine(**found, absent=absent)  # type: ignore[arg-type]
    try:
        runtime = tuple(inference.get_trt_runtime_version())
    except Exception as error:  # (NotFound) when libnvinfer.so cannot be loaded
        absent["tensorrt_runtime"] = runtime_error_line(error)
    else:
        found["tensorrt_runtime"] = runtime if any(runtime) else None
        if not any(runtime):
            absent["tensorrt_runtime"] = "libnvinfer was not found"
    return Machine(**found, absent={name: why for name, why in absent.items() if why})  # type: ignore[arg-type]


def _gpus(paddle: object) -> tuple[tuple[str, ...], str]:
    cuda = paddle.device.cuda  # type: ignore[attr-defined]
    try:
        count = cuda.device_count()
        names = tuple(cuda.get_device_properties(index).name for index in range(count))
    except Exception as error:  # no driver, a driver too old
        return (), runtime_error_line(error)
    return names, "" if names else "Paddle sees no NVIDIA GPU (no device, or no driver)"


def _cpu() -> tuple[str, bool | None]:
    name, flags = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip() or name
            elif key.strip() in ("flags", "Features"):
                flags = value.split()
                break
    return name, None if flags is None else "avx512_vnni" in flags
