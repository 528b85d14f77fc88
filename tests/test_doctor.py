"""The doctor: its conclusions from its findings, and that no finding makes it fail."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from act_pipeline.doctor import diagnosis as diagnosing
from act_pipeline.doctor.command import EXIT_CANNOT_RUN
from act_pipeline.doctor.diagnosis import Diagnosis, diagnose, judge
from act_pipeline.doctor.machine import describe_machine, nvidia_driver
from act_pipeline.doctor.probe import read_probe
from act_pipeline.doctor.requirements import (
    MISSING,
    REQUIREMENTS,
    Check,
    Requirement,
    check_package,
    installed_version,
    remedy_for,
    version_fits,
)
from act_pipeline.doctor.tables import format_diagnosis

ROOT = Path(__file__).resolve().parents[1]
PADDLE = next(requirement for requirement in REQUIREMENTS if requirement.module == "paddle")
CPU_ENGINES = [
    {"engine": "paddle", "precision": precision, "device": "CPU", "available": True, "why": "native", "remedy": ""}
    for precision in ("fp32", "int8")
]
NO_GPU = [
    {
        "engine": "paddle_trt",
        "precision": precision,
        "device": "GPU",
        "available": False,
        "why": "no NVIDIA GPU",
        "remedy": "check the driver",
    }
    for precision in ("fp32", "fp16", "int8")
]


def run_doctor(python: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor from the repository's root with another interpreter or environment, as a user would."""
    command = [str(python), "-m", "act_pipeline.doctor", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("found", "expected", "fits"),
    [
        ("2.6.2", "==2.6.2", True),
        ("2.6.2.post118", "==2.6.2", True),
        ("2.6.20", "==2.6.2", False),
        ("1.23.5", ">=1.23,<2", True),
        ("2.0.0", ">=1.23,<2", False),
        ("1.9", ">=1.23,<2", False),
        ("10.4.0", "<11", True),
        ("11.0.0", "<11", False),
        ("3.10.1", "<3.9", False),
        ("anything", "", True),
    ],
)
def test_version_bounds(found: str, expected: str, fits: bool) -> None:
    assert version_fits(found, expected) is fits


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        ("ImportError: libGL.so.1: cannot open shared object file: No such file", "opencv-python-headless"),
        ("ImportError: libgthread-2.0.so.0: cannot open shared object file", "opencv-python-headless"),
        ("ImportError: libgomp.so.1: cannot open shared object file", "libgomp1"),
        ("ImportError: libcudnn.so.8: cannot open shared object file", "cuDNN 8.6"),
        ("ImportError: libcuda.so.1: cannot open shared object file", "driver"),
        ("ImportError: /lib/libm.so.6: version `GLIBC_2.28' not found", "newer Linux"),
        ("ModuleNotFoundError: No module named 'pkg_resources'", "setuptools<81"),
        ("ValueError: numpy.dtype size changed, may indicate binary incompatibility", "numpy<2"),
        ("importing paddle ended the process with signal 11 (SIGSEGV)", "requirements/cpu.txt"),
        ("RuntimeError: something never seen before", "requirements/cpu.txt"),
    ],
)
def test_remedies(failure: str, remedy: str) -> None:
    assert remedy in remedy_for(failure)


def test_a_missing_package_is_named() -> None:
    check = check_package(PADDLE, {}, {})
    assert (check.name, check.found, check.ok) == ("paddlepaddle", "missing", False)


def test_a_package_of_another_version_is_refused_with_the_reason() -> None:
    check = check_package(PADDLE, {"paddle": ""}, {"paddlepaddle": "3.3.1"})
    assert not check.ok and check.found == "3.3.1" and check.expected == "==2.6.2" and "ACT" in check.why


def test_either_paddle_package_is_enough_but_not_both() -> None:
    assert check_package(PADDLE, {"paddle": ""}, {"paddlepaddle-gpu": "2.6.2"}).ok
    both = check_package(PADDLE, {"paddle": ""}, {"paddlepaddle": "2.6.2", "paddlepaddle-gpu": "2.6.2"})
    assert not both.ok and "uninstall" in both.why


def test_an_import_that_fails_outweighs_a_version_that_fits() -> None:
    requirement = Requirement(("opencv-python-headless", "opencv-python"), ">=4.5,<5", "cv2")
    failure = "ImportError: libGL.so.1: cannot open shared object file"
    check = check_package(requirement, {"cv2": failure}, {"opencv-python": "4.6.0.66"})
    assert not check.ok and check.name == "opencv-python" and "libGL.so.1" in check.why and "libgl1" in check.why


@pytest.mark.parametrize(
    ("ended", "said"), [(-11, "signal 11 (SIGSEGV)"), (3, "exit code 3"), (None, "did not end in")]
)
def test_a_probe_that_died_blames_what_it_was_trying(ended: int | None, said: str) -> None:
    text = '{"trying": "numpy"}\n{"module": "numpy", "failure": ""}\n{"trying": "paddle"}\n{"modu'
    result = read_probe(text, ended)
    assert result["imports"]["numpy"] == "" and said in result["imports"]["paddle"]
    assert result["machine"] is None and result["engines"] == []


def test_judgement() -> None:
    fine = Check("numpy", "1.23.5", "", True)
    broken = Check("paddleslim", MISSING, "==2.6.0", False, "not installed")
    assert judge([fine], {}, CPU_ENGINES + NO_GPU).can_run
    without = judge([fine, broken], {}, CPU_ENGINES)
    assert not without.can_run and "paddleslim (missing)" in without.verdict
    assert "requirements/cpu.txt" in without.verdict
    no_int8 = judge([fine], {}, CPU_ENGINES[:1] + NO_GPU)
    assert not no_int8.can_run and "int8" in no_int8.verdict and "fp32" not in no_int8.verdict
    gpu = dict(NO_GPU[1], available=True)
    assert "fp16 on the GPU" in judge([fine], {}, [*CPU_ENGINES, gpu]).verdict


def test_tables_say_why_and_what_to_do_once() -> None:
    broken = Check("pillow", "12.0.0", "<11", False, "importing paddleslim crashed")
    text = format_diagnosis(judge([broken], {"CUDA": "none (the CPU package)"}, CPU_ENGINES + NO_GPU))
    assert "NOT OK: importing paddleslim crashed" in text and "none (the CPU package)" in text
    assert text.count("no NVIDIA GPU; check the driver") == 1 and "fp32, fp16, int8" in text


def test_machine_rows_give_the_reason_for_what_is_absent() -> None:
    machine = {
        "cpu": "EPYC",
        "cores": 2,
        "avx512_vnni": True,
        "gpus": ["H100", "H100"],
        "cuda": "11.8",
        "cudnn": None,
        "tensorrt_compiled": [8, 5, 3],
        "tensorrt_runtime": None,
        "absent": {"tensorrt_runtime": "libnvinfer is missing"},
        "packages": {"openvino": "2026.4.1", "onnxruntime": "1.31"},
    }
    rows = describe_machine(machine, "H100, 535.104")
    assert rows["GPUs for Paddle"] == "H100, H100" and rows["CUDA"] == "built for 11.8"
    assert rows["TensorRT, compiled"] == "8.5.3" and "libnvinfer is missing" in rows["TensorRT, runtime"]
    assert rows["cuDNN"].startswith("none") and rows["NVIDIA driver"] == "H100, 535.104" and "VNNI" in rows["CPU"]
    assert rows["optional packages"] == "onnxruntime 1.31"  # openvino is one of the required packages


def test_nvidia_driver_tells_apart_absent_answering_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no nvidia-smi" in nvidia_driver()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 535.104'\n")
    tool.chmod(0o755)
    assert nvidia_driver() == "NVIDIA H100, 81559 MiB, 535.104"
    tool.write_text("#!/bin/sh\necho 'cannot talk to the driver' >&2\nexit 9\n")
    assert nvidia_driver() == "cannot talk to the driver"


def test_without_any_package_it_runs_and_says_what_to_install(tmp_path: Path) -> None:
    venv.EnvBuilder(symlinks=True, with_pip=False).create(tmp_path / "bare")
    ended = run_doctor(tmp_path / "bare" / "bin" / "python")
    assert ended.returncode == EXIT_CANNOT_RUN and ended.stderr == ""
    assert "paddlepaddle (missing)" in ended.stdout and "requirements/cpu.txt" in ended.stdout.splitlines()[-1]


def test_a_package_that_crashes_on_import_becomes_a_line(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    ended = run_doctor(sys.executable, "--json", PYTHONPATH=str(tmp_path))
    assert ended.returncode == EXIT_CANNOT_RUN
    check = next(c for c in json.loads(ended.stdout)["checks"] if c["name"].startswith("opencv"))
    assert not check["ok"] and "SIGSEGV" in check["why"]


@pytest.mark.parametrize("package", ["onnx", "openvino"])
def test_what_int8_on_a_cpu_runs_with_counts_as_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    monkeypatch.setattr(
        diagnosing, "installed_version", lambda name: None if name == package else installed_version(name)
    )
    monkeypatch.setattr(diagnosing, "run_probe", lambda: {"imports": {}, "machine": None, "engines": CPU_ENGINES})
    diagnosis = diagnose()
    assert not diagnosis.can_run and diagnosis.verdict.startswith(f"cannot run here yet: {package} (missing); ")


def test_here_the_basic_path_can_run(tmp_path: Path) -> None:
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    ended = run_doctor(sys.executable, "--json", HOME=str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not (tmp_path / "intel").exists(), "openvino_telemetry was imported"
    report = json.loads(ended.stdout)
    assert set(report) == {field.name for field in dataclasses.fields(Diagnosis)}
    found = {check["name"]: check["found"] for check in report["checks"]}
    for package in ("paddleslim", "paddledet", "numpy", "onnx", "openvino"):
        assert found[package] == importlib.metadata.version(package)
    available = {(e["engine"], e["precision"], e["device"]) for e in report["engines"] if e["available"]}
    assert {("paddle", "fp32", "CPU"), ("paddle", "int8", "CPU")} <= available
    for entry in report["engines"]:
        assert entry["available"] or (entry["why"] and entry["remedy"]), entry
