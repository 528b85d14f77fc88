"""Says what is installed, what this machine has, and which engines can run here: ``python -m act_pipeline.doctor``.

It needs nothing but Python: with no package installed at all, it says what to install. Whatever could end the
process (an import of a package that does not fit, a driver) is tried in a process of its own, so that a crash
becomes a line of the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import run_command
from act_pipeline.core.fresh_process import package_environment
from act_pipeline.core.tables import text_table
from act_pipeline.core.version import __version__

EXIT_CANNOT_RUN = 1
MISSING = "missing"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 9), (3, 12)
_PROBE_LIMIT_SECONDS = 300
_INSTALL = "install with `make env`, or pip install --require-hashes --no-deps -r requirements/cpu.txt"


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that the basic path needs.

    Attributes:
        names: the packages that provide it; one of them is enough.
        expected: version bounds such as ``>=1.23,<2``; empty for any.
        module: what to import to see that it works; empty where its version says enough.
        why: what happens outside the bounds.
    """

    names: tuple[str, ...]
    expected: str = ""
    module: str = ""
    why: str = ""


REQUIREMENTS = (
    Requirement(("numpy",), ">=1.23,<2", "numpy", "paddlepaddle 2.6.2 was built against NumPy 1"),
    Requirement(("pillow",), "<11", "PIL.Image", "importing paddleslim with later ones crashed the process"),
    Requirement(("matplotlib",), "<3.9", "matplotlib", "importing paddleslim with later ones crashed the process"),
    Requirement(("setuptools",), "<81", "pkg_resources", "ppdet imports pkg_resources, which later ones lack"),
    Requirement(("opencv-python-headless", "opencv-python"), ">=4.5,<5", "cv2", "paddleslim asks for 4.6.0.66"),
    Requirement(("pycocotools",), "", "pycocotools.mask"),
    Requirement(("pyyaml",), "", "yaml"),
    Requirement(("jinja2",), "", "jinja2"),
    Requirement(("onnx",), ">=1.19,<1.24", "onnx", "what is built on it was tried with these"),
    Requirement(("openvino",), ">=2025.3,<2026.5", "openvino", "what is built on it was tried with these"),
    Requirement(("protobuf",), ">=3.20.2", "google.protobuf", "paddlepaddle needs 3.20.2 or later"),
    Requirement(("scikit-learn",), "", "sklearn"),
    Requirement(("scipy",), "", "scipy"),
    Requirement(("six",)),
    Requirement(("requests",)),
    Requirement(("tqdm",)),
    Requirement(("paddlepaddle", "paddlepaddle-gpu"), "==2.6.2", "paddle", "ACT of paddleslim 2.6.0 fails on paddle 3"),
    Requirement(("paddledet",), "==2.6.0", "ppdet", "what is built on it was tried with 2.6.0"),
    Requirement(("paddleslim",), "==2.6.0", "paddleslim", "what is built on it was tried with 2.6.0"),
)

# What an import says -> what to do about it. The first that fits counts.
_REMEDIES = (
    (
        r"libGL\.so|libgthread|libglib",
        "pip install --force-reinstall --no-deps opencv-python-headless==4.6.0.66 "
        "(or, as root: apt-get install libgl1 libglib2.0-0)",
    ),
    (r"libgomp\.so", "as root: apt-get install libgomp1"),
    (r"libcuda\.so", "install the NVIDIA driver, or requirements/cpu.txt on a machine without a GPU"),
    (
        r"libcudnn|libcudart|libcublas|libcufft|libcusolver|libcusparse|libcurand",
        "install CUDA 11.8 and cuDNN 8.6 and put their folders into LD_LIBRARY_PATH, or install requirements/cpu.txt",
    ),
    (r"libnvinfer", "install TensorRT 8.5.3 and put its lib folder into LD_LIBRARY_PATH"),
    (r"GLIBC(XX)?_", "use a newer Linux: the wheels are built for glibc 2.28 or later"),
    (r"numpy\.dtype size|_ARRAY_API|numpy\.core\.multiarray", "pip install 'numpy<2'"),
    (r"pkg_resources", "pip install 'setuptools<81'"),
    (r"signal \d+|SIG[A-Z]+", _INSTALL),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the first table: what was found, what was expected, and what to do if that is not the same."""

    name: str
    found: str
    expected: str
    ok: bool
    why: str = ""
    required: bool = True


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


def version_fits(found: str, expected: str) -> bool:
    """Tell whether a version is within bounds such as ``>=1.23,<2`` (operators ``==``, ``>=`` and ``<``).

    Only the leading numbers are compared, so ``1.26.4.post1`` counts as 1.26.4. No bounds: any version fits.
    """

    def numbers(version: str) -> tuple[int, ...]:
        leading = re.match(r"\d+(\.\d+)*", version)
        parts = [int(part) for part in leading.group().split(".")] if leading else []
        while parts and parts[-1] == 0:
            parts.pop()
        return tuple(parts)

    for bound in filter(None, (part.strip() for part in expected.split(","))):
        operator = "<" if bound.startswith("<") else bound[:2]
        have, want = numbers(found), numbers(bound[len(operator) :])
        if not {"==": have == want, ">=": have >= want, "<": have < want}[operator]:
            return False
    return True


def remedy_for(message: str) -> str:
    """Return what to do about an import that failed with ``message``."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message):
            return remedy
    return _INSTALL


def installed_version(name: str) -> str | None:
    """Return a package's version without importing it, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """Check the running Python and its platform against what the locks are made for."""
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    ok = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    why = "" if ok else "paddlepaddle 2.6.2 has wheels for 3.9 to 3.12: make the environment with one of these"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        ok, why = False, "the locks are made for Linux on x86_64: use such a machine or container"
    return Check("python", found, "3.9 to 3.12, Linux x86_64", ok, why)


def check_package(requirement: Requirement, imports: Mapping[str, str], versions: Mapping[str, str | None]) -> Check:
    """Judge one package.

    Args:
        requirement: what is needed.
        imports: module -> "" if it could be imported, else what went wrong; a module that is absent was not tried.
        versions: package -> installed version, None if it is not.
    """
    found = {name: versions[name] for name in requirement.names if versions.get(name)}
    label = next(iter(found), requirement.names[0])
    shown = ", ".join(f"{name} {version}" if len(found) > 1 else str(version) for name, version in found.items())
    failure = imports.get(requirement.module, "")
    if not found:
        return Check(label, MISSING, requirement.expected, False, "not installed")
    if requirement.module == "paddle" and len(found) > 1:
        why = "both packages write the same files: pip uninstall paddlepaddle paddlepaddle-gpu, then install one"
        return Check(label, shown, requirement.expected, False, why)
    if failure:
        return Check(label, shown, requirement.expected, False, f"{failure}; {remedy_for(failure)}")
    for version in found.values():
        if not version_fits(str(version), requirement.expected):
            return Check(label, shown, requirement.expected, False, f"{requirement.why}; {_INSTALL}")
    return Check(label, shown, requirement.expected, True)


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


def probe(report: Path) -> None:
    """Try the imports and ask the engines, writing a JSON line after each to ``report``: a crash shows where it was.

    It is for a process of its own: what it hides from OpenVINO stays hidden.
    """
    # `import openvino` would report itself through this package, unasked, and write ~/intel.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # typeshed: modules only
    with report.open("w", encoding="utf-8", buffering=1) as lines:

        def tell(**facts: Any) -> None:
            lines.write(json.dumps(facts) + "\n")
            lines.flush()

        for module in [requirement.module for requirement in REQUIREMENTS if requirement.module]:
            tell(trying=module)
            try:
                __import__(module)
            except Exception as error:  # a package that does not fit raises anything
                tell(module=module, failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])
            else:
                tell(module=module, failure="")
        tell(trying="act_pipeline.engines")
        try:
            from act_pipeline import engines

            machine = engines.machine()
            supported = [dataclasses.asdict(entry) for entry in engines.support()]
            tell(machine={**dataclasses.asdict(machine), "absent": dict(machine.absent)}, engines=supported)
        except Exception as error:  # engines import what may be missing
            tell(module="act_pipeline.engines", failure=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def run_probe() -> dict[str, Any]:
    """Run :func:`probe` in a process of its own.

    Returns:
        ``imports`` (module -> "" or what went wrong), ``machine`` (a dict, or None) and ``engines`` (a list of dicts).
    """
    with tempfile.TemporaryDirectory(prefix="act_pipeline.") as folder:
        report = Path(folder) / "probe.jsonl"
        command = [sys.executable, "-m", "act_pipeline.doctor", "--probe", str(report)]
        try:
            ended = subprocess.run(
                command, env=package_environment(), capture_output=True, timeout=_PROBE_LIMIT_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            ended = None
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    return read_probe(text, ended)


def read_probe(text: str, ended: int | None) -> dict[str, Any]:
    """Read what :func:`probe` wrote; ``ended`` is its exit code, below zero for a signal, None if it was stopped."""
    result: dict[str, Any] = {"imports": {}, "machine": None, "engines": []}
    trying = ""
    for line in text.splitlines():
        try:
            facts = json.loads(line)
        except ValueError:  # the line that a crash cut short
            continue
        trying = facts.get("trying", trying)
        if "module" in facts:
            result["imports"][facts["module"]] = facts["failure"]
        if "machine" in facts:
            result["machine"], result["engines"] = facts["machine"], facts["engines"]
    if ended != 0 and trying:
        if ended is None:
            how = f"did not end in {_PROBE_LIMIT_SECONDS} s"
        elif ended < 0:
            how = f"ended the process with signal {-ended} ({signal.Signals(-ended).name})"
        else:
            how = f"ended the process with exit code {ended}"
        result["imports"][trying] = f"importing {trying} {how}"
    return result


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
        verdict = f"cannot run here yet: {named}; {_INSTALL if missing else 'what to do stands in the table'}"
    elif lacking:
        verdict = f"cannot run here yet: no engine for {' and '.join(lacking)} on the CPU"
    else:
        verdict = "FP32 and INT8 can run here on the CPU"
        on_gpu = sorted({entry["precision"] for entry in engines if entry["available"] and entry["device"] == "GPU"})
        verdict += f", and {', '.join(on_gpu)} on the GPU" if on_gpu else ""
    return Diagnosis(checks, machine, engines, not broken and not lacking, verdict)


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the three tables and the verdict as text."""
    packages = [(c.name, c.found, c.expected or "any", "ok" if c.ok else f"NOT OK: {c.why}") for c in diagnosis.checks]
    # Rows that differ in nothing but the precision become one: one reason, said once.
    precisions: dict[tuple[str, ...], list[str]] = {}
    for entry in diagnosis.engines:
        reason = entry["why"] if entry["available"] else f"{entry['why']}; {entry['remedy']}"
        key = (entry["engine"], entry["device"], "yes" if entry["available"] else "no", reason)
        precisions.setdefault(key, []).append(entry["precision"])
    engines = [(key[0], ", ".join(found), *key[1:]) for key, found in precisions.items()]
    parts = [
        text_table(("package", "found", "expected", "verdict"), packages, prose=True),
        text_table(("machine", "found"), list(diagnosis.machine.items()), prose=True),
    ]
    if engines:
        header = ("engine", "precision", "device", "runs here", "how, or why not and what to do")
        parts.append(text_table(header, engines, prose=True))
    return "\n\n".join([*parts, diagnosis.verdict])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; returns 0 if FP32 and INT8 can run here on the CPU, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.probe:
        probe(arguments.probe)
        return 0
    diagnosis = diagnose()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        print(format_diagnosis(diagnosis))
    return 0 if diagnosis.can_run else EXIT_CANNOT_RUN


if __name__ == "__main__":
    sys.argv[0] = "python -m act_pipeline.doctor"  # argparse names the program after it
    sys.exit(run_command(main))
