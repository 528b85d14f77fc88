"""The machine's hardware and drivers, as lines of a table."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from act_pipeline.doctor.requirements import REQUIREMENTS


def nvidia_driver() -> str:
    """Return what ``nvidia-smi`` says of the GPUs and the driver, or why there is nothing to say."""
    if shutil.which("nvidia-smi") is None:
        return "none (no nvidia-smi on the PATH)"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {error}"
    lines = [line.strip() for line in (asked.stdout if asked.returncode == 0 else asked.stderr).splitlines()]
    return "; ".join(filter(None, lines)) or f"nvidia-smi ended with {asked.returncode}"


def describe_machine(machine: Mapping[str, Any] | None, driver: str) -> dict[str, str]:
    """Turn :class:`act_pipeline.engines.Machine`, as a dict, into name -> finding; None if it could not be asked."""
    described = {"NVIDIA driver": driver}
    if machine is None:
        return {"CPU": platform.processor() or platform.machine(), **described}
    absent = machine.get("absent", {})

    def finding(field: str, prefix: str = "") -> str:
        value = machine.get(field)
        if isinstance(value, (list, tuple)):
            joined = (", " if field == "gpus" else ".").join(str(part) for part in value)
            value = joined or None
        return f"{prefix}{value}" if value else f"none ({absent.get(field, 'not found')})"

    def feature(field: str, name: str) -> str:
        value = machine.get(field)
        return "" if value is None else f"with {name}" if value else f"without {name}"

    features = (feature("avx512_vnni", "AVX512-VNNI"), feature("bf16", "bf16"))
    required = {name for requirement in REQUIREMENTS for name in requirement.names}
    packages = {name: version for name, version in (machine.get("packages") or {}).items() if name not in required}
    return {
        "CPU": ", ".join(filter(None, (str(machine.get("cpu")), f"{machine.get('cores')} usable cores", *features))),
        **described,
        "GPUs for Paddle": finding("gpus"),
        "CUDA": finding("cuda", "built for "),
        "cuDNN": finding("cudnn", "built for "),
        "TensorRT, compiled": finding("tensorrt_compiled"),
        "TensorRT, runtime": finding("tensorrt_runtime"),
        "optional packages": ", ".join(f"{name} {version}" for name, version in packages.items()) or "none",
    }
