"""Detection of the CPU, the GPUs and the installed runtimes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_pipeline.core.cpus import available_cpus
from act_pipeline.engines.device import paddle_gpus
from act_pipeline.engines.interface import runtime_error_line

# Optional packages: importable module -> names of the distributions that contain it.
_PACKAGES = {"onnx": ("onnx",), "openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}
_NVIDIA_SMI_SECONDS = 30


@dataclass(frozen=True)
class Machine:
    """The CPU, the GPUs, the installed packages and the build options of Paddle.

    Attributes:
        cpu: name of the CPU.
        cores: number of CPUs that this process may use.
        avx512_vnni: whether the CPU has the 8-bit dot products of AVX512-VNNI; None if the system lists no CPU flags.
        bf16: whether the CPU has bf16 instructions; None if the system lists no CPU flags.
        gpus: names of the GPUs that Paddle can use.
        nvidia_gpus: names of the GPUs that the driver lists, whether or not Paddle can use them.
        packages: installed optional package -> version: ``onnx``, ``onnxruntime``, ``onnxruntime-gpu`` (then
            ``onnxruntime`` too), ``openvino``.
        paddle: version of Paddle; None if it cannot be imported.
        paddle_onednn: whether Paddle was built with oneDNN.
        cuda: CUDA version that Paddle was built for; None for the CPU package.
        cudnn: cuDNN version that Paddle was built for; None for the CPU package.
        tensorrt_compiled: (major, minor, patch) of the TensorRT that Paddle was built with; None without TensorRT.
        tensorrt_runtime: (major, minor, patch) of the libnvinfer that was found; None if there is none.
        absent: attribute name -> why it is None or empty.
    """

    cpu: str
    cores: int
    avx512_vnni: bool | None
    bf16: bool | None = None
    gpus: tuple[str, ...] = ()
    nvidia_gpus: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    paddle: str | None = None
    paddle_onednn: bool = False
    cuda: str | None = None
    cudnn: str | None = None
    tensorrt_compiled: tuple[int, ...] | None = None
    tensorrt_runtime: tuple[int, ...] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)


@functools.lru_cache(maxsize=1)
def machine() -> Machine:
    """Return a description of this machine, detected once per process; imports Paddle if it is installed."""
    cpu, flags = _cpu()
    found: dict[str, Any] = {"cpu": cpu, "cores": available_cpus(), "packages": optional_packages()}
    found["avx512_vnni"] = None if flags is None else "avx512_vnni" in flags
    found["bf16"] = None if flags is None else bool(_BF16_FLAGS & flags)
    absent: dict[str, str] = {}
    if flags is None:
        absent["avx512_vnni"] = absent["bf16"] = "the system does not list the CPU's flags"
    found["nvidia_gpus"], absent["nvidia_gpus"] = _nvidia_gpus()
    try:
        import paddle
        from paddle import inference
        from paddle.base import core
    except Exception as error:  # a broken wheel raises anything from ImportError to OSError
        absent["paddle"] = f"paddlepaddle cannot be imported: {runtime_error_line(error)}"
        for name in ("gpus", "cuda", "cudnn", "tensorrt_compiled", "tensorrt_runtime"):
            absent[name] = absent["paddle"]
        return Machine(**found, absent=_said(absent))
    found["paddle"] = paddle.__version__
    # `core` is internal to Paddle; Paddle 2.6 has no public function for this.
    found["paddle_onednn"] = bool(getattr(core, "is_compiled_with_mkldnn", lambda: False)())
    if not paddle.is_compiled_with_cuda():
        why = f"paddlepaddle {paddle.__version__} is the CPU package"
        absent.update(dict.fromkeys(("gpus", "cuda", "cudnn", "tensorrt_compiled", "tensorrt_runtime"), why))
        return Machine(**found, absent=_said(absent))
    found["cuda"], found["cudnn"] = str(paddle.version.cuda()), str(paddle.version.cudnn())
    found["gpus"], absent["gpus"] = paddle_gpus(paddle)
    compiled = tuple(inference.get_trt_compile_version())
    found["tensorrt_compiled"] = compiled if any(compiled) else None
    if not any(compiled):
        absent["tensorrt_compiled"] = f"paddlepaddle-gpu {paddle.__version__} was built without TensorRT"
        absent["tensorrt_runtime"] = absent["tensorrt_compiled"]
        return Machine(**found, absent=_said(absent))
    try:
        runtime = tuple(inference.get_trt_runtime_version())
    except Exception as error:  # (NotFound) when libnvinfer.so cannot be loaded
        absent["tensorrt_runtime"] = runtime_error_line(error)
    else:
        found["tensorrt_runtime"] = runtime if any(runtime) else None
        if not any(runtime):
            absent["tensorrt_runtime"] = "libnvinfer was not found"
    return Machine(**found, absent=_said(absent))


def optional_packages() -> dict[str, str]:
    """Return the versions of the installed optional packages without importing them.

    Returns:
        name of the module or distribution -> version; ``of unknown version`` for a module without package metadata.
    """
    found = {}
    for module, names in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            continue
        found[module] = "of unknown version"
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = found[module] = importlib.metadata.version(name)
    return found


def _said(absent: Mapping[str, str]) -> dict[str, str]:
    return {name: why for name, why in absent.items() if why}


def _nvidia_gpus() -> tuple[tuple[str, ...], str]:
    """Return the GPUs that ``nvidia-smi`` lists, and why there are none.

    A tool in a process of its own: a library that lists GPUs can leave a CUDA context in this process, which must not
    be forked afterwards.
    """
    if shutil.which("nvidia-smi") is None:
        return (), "no NVIDIA GPU (no nvidia-smi on the PATH)"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not answer: {runtime_error_line(error)}"
    if asked.returncode != 0:
        return (), f"nvidia-smi: {' '.join((asked.stderr or asked.stdout).split())[:200]}"
    names = tuple(line.strip() for line in asked.stdout.splitlines() if line.strip())
    return names, "" if names else "no NVIDIA GPU (nvidia-smi lists none)"


def _cpu() -> tuple[str, set[str] | None]:
    """Return the name of the CPU and its flags; None for the flags if the system does not list them."""
    name, flags = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip() or name
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return name, flags
