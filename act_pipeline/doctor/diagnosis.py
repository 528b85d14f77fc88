"""What was found, and whether FP32 and INT8 can run on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from act_pipeline.core.version import __version__
from act_pipeline.doctor.machine import describe_machine, nvidia_driver
from act_pipeline.doctor.probe import run_probe
from act_pipeline.doctor.requirements import (
    INSTALL,
    MISSING,
    REQUIREMENTS,
    Check,
    check_package,
    check_python,
    installed_version,
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found.

    Attributes:
        checks: Python and the packages.
        machine: name -> finding, for the CPU, the GPUs, CUDA, cuDNN and TensorRT.
        engines: an entry an engine, precision and device: ``engine``, ``precision``, ``device``, ``available``,
            ``why``, ``remedy``.
        can_run: FP32 and INT8 run here on the CPU, from export to evaluation.
        verdict: the same in one line.
    """

    checks: list[Check]
    machine: dict[str, str]
    engines: list[dict[str, Any]]
    can_run: bool
    verdict: str


def diagnose() -> Diagnosis:
    """Look at the packages, the machine and the engines; takes some seconds, in which paddle is imported."""
    probed = run_probe()
    names = [name for requirement in REQUIREMENTS for name in requirement.names]
    versions = {name: installed_version(name) for name in names}
    checks = [Check("act_pipeline", __version__, "", True), check_python()]
    checks += [check_package(requirement, probed["imports"], versions) for requirement in REQUIREMENTS]
    engines_failure = probed["imports"].get("act_pipeline.engines", "")
    if engines_failure:
        checks.append(Check("act_pipeline.engines", "cannot be asked", "", False, engines_failure))
    machine = describe_machine(probed["machine"], nvidia_driver())
    return judge(checks, machine, probed["engines"])


def judge(checks: list[Check], machine: dict[str, str], engines: list[dict[str, Any]]) -> Diagnosis:
    """Decide whether FP32 and INT8 on the CPU can run, and say it in one line."""
    broken = [check for check in checks if check.required and not check.ok]
    on_cpu = {entry["precision"] for entry in engines if entry["available"] and entry["device"].upper() == "CPU"}
    lacking = [precision for precision in ("fp32", "int8") if precision not in on_cpu]
    if broken:
        named = ", ".join(f"{check.name} ({check.found})" for check in broken)
        missing = any(check.found == MISSING for check in broken)
        verdict = f"cannot run here yet: {named}; {INSTALL if missing else 'what to do stands in the table'}"
    elif lacking:
        verdict = f"cannot run here yet: no engine for {' and '.join(lacking)} on the CPU"
    else:
        verdict = "FP32 and INT8 can run here on the CPU"
        on_gpu = sorted({entry["precision"] for entry in engines if entry["available"] and entry["device"] == "GPU"})
        verdict += f", and {', '.join(on_gpu)} on the GPU" if on_gpu else ""
    return Diagnosis(checks, machine, engines, not broken and not lacking, verdict)
