"""The locks, the metadata, the Makefile, and the environment made from them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from act_pipeline import __version__
from act_pipeline.doctor.requirements import REQUIREMENTS, version_fits

ROOT = Path(__file__).resolve().parents[1]
# Requirements of the package for the ONNX export and for INT8 on a CPU.
LOWERING = {"onnx", "openvino"}
# Separate locks and extras, and their packages.
RUNTIMES = {
    "openvino": {"openvino"},
    "onnxruntime": {"onnxruntime"},
    "tensorrt-rtx": {"tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs", "cuda-bindings"},
}
LOCKS = ("cpu", "gpu", "dev", *RUNTIMES, "nncf", "paddle3", "serve", "lock-tool")
PYTHONS = ("3.9", "3.10", "3.11", "3.12")
PADDLE = {"cpu": "paddlepaddle", "gpu": "paddlepaddle-gpu"}


def canonical(name: str) -> str:
    """Return a package's name in the normalized form of package indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(lock: str) -> dict[Requirement, list[str]]:
    """Return the requirements of a lock with their hashes; fail on any other line except comments."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    found: dict[Requirement, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = re.split(r"\s+--hash=", line.strip())
        found[Requirement(words[0])] = words[1:]
    return found


def pins(lock: str, python: str) -> dict[str, str]:
    """Return name -> version of the packages that a lock installs on Linux with one Python."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
    }
    found: dict[str, str] = {}
    for requirement in entries(lock):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            assert canonical(requirement.name) not in found, f"{requirement.name} twice on Python {python}"
            found[canonical(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_has_hashes_and_nothing_says_where_it_came_from(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    assert entries(lock)
    for requirement, hashes in entries(lock).items():
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement
        assert requirement.url is None
    for trace in ("://", "file:", "--index", "--extra-index", "--find-links", "--trusted-host", " /", "@"):
        assert trace not in text, trace


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", PADDLE)
def test_the_versions_that_work_together(lock: str, python: str) -> None:
    found = pins(lock, python)
    wanted = {
        PADDLE[lock]: "2.6.2",
        "paddleslim": "2.6.0",
        "paddledet": "2.6.0",
        "opencv-python-headless": "4.6.0.66",
        "numpy": "1.26.4" if python == "3.12" else "1.23.5",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert not {"sklearn", "opencv-python", *PADDLE.values()} - {PADDLE[lock]} & set(found)
    for requirement in REQUIREMENTS:  # the doctor expects the versions of the lock
        (name,) = [name for name in requirement.names if name in found]
        assert version_fits(found[name], requirement.expected), (name, found[name])


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_agree_with_each_other(python: str) -> None:
    cpu, gpu, dev = (pins(lock, python) for lock in ("cpu", "gpu", "dev"))
    assert cpu.pop(PADDLE["cpu"]) == gpu.pop(PADDLE["gpu"])
    assert cpu == gpu
    assert {name: cpu[name] for name in dev if name in cpu} == {name: dev[name] for name in dev if name in cpu}
    assert {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy"} <= set(dev)
    assert LOWERING <= set(cpu) and not {"onnxruntime", "nncf"} & set(cpu), "ONNX Runtime and NNCF stay optional"
    for name, packages in RUNTIMES.items():  # the packages of the tests, which change no other pin
        runtime = pins(name, python)
        assert packages | {"onnx"} <= set(runtime)
        assert runtime == {package: {**cpu, **dev}.get(package) for package in runtime}
    elsewhere = {**cpu, **dev}
    serve = pins("serve", python)
    assert {"nvidia-pytriton", "tritonclient"} <= set(serve)
    assert {name: elsewhere[name] for name in serve if name in elsewhere} == {
        name: serve[name] for name in serve if name in elsewhere
    }, "the server runs with the versions that everything else was tested with"
    peer = pins("nncf", python)
    assert ({"nncf", "openvino", "onnx"} <= set(peer)) == (python != "3.9"), "nncf 3.4 is for Python 3.10 and later"
    assert {name: elsewhere[name] for name in peer if name in elsewhere} == {
        name: peer[name] for name in peer if name in elsewhere
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_the_environment_for_paddle3(python: str) -> None:
    found = pins("paddle3", python)
    assert (found["paddlepaddle"][:4], found["paddle2onnx"][:4]) == ("3.2.", "2.1.")
    assert {"packaging", "numpy", "onnx"} <= set(found)


def test_the_installed_packages_contradict_each_other_only_where_it_is_known() -> None:
    known = {("paddledet", "opencv-python"), ("paddledet", "sklearn"), ("paddleslim", "opencv-python")}
    if sys.version_info >= (3, 12):
        known.add(("paddledet", "numpy"))
    locked = pins("cpu", ".".join(map(str, sys.version_info[:2])))
    contradictions = set()
    for name in locked:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, distribution.requires or ()):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            try:
                version = importlib.metadata.version(needed.name)
            except importlib.metadata.PackageNotFoundError:
                version = ""
            if not version or not needed.specifier.contains(version, prereleases=True):
                contradictions.add((canonical(name), canonical(needed.name)))
    assert contradictions <= known


def run_python(source: str) -> int:
    """Run a line of Python from the repository's root; return the exit code, negative for a signal."""
    command = [sys.executable, "-c", source]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False).returncode


@pytest.mark.parametrize("first", ["paddle", "ppdet", "paddleslim"])
def test_importing_act_pipeline_first_makes_paddle_safe(first: str) -> None:
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    decompress = "import os, zlib; assert zlib.decompress(zlib.compress(os.urandom(1 << 20)))"
    assert run_python(f"import act_pipeline; import {first}; {decompress}") == 0


def test_the_crash_that_act_pipeline_prevents_is_still_there() -> None:
    """If this fails, paddlepaddle has fixed the crash, and the import of zlib in the package can be removed."""
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    ended = run_python("import paddle, zlib; zlib.decompress(zlib.compress(bytes(1 << 20)))")
    assert ended in (-signal.SIGSEGV, -signal.SIGABRT)  # depends on the overwritten memory


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that pip builds from, so that nothing is written to the repository."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("act_pipeline", "configs", "requirements"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def run_setup(tree: Path, *arguments: str) -> None:
    """Run setup.py in a source tree with the installed setuptools."""
    command = [sys.executable, "setup.py", "-q", *arguments]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, timeout=120)


def test_metadata(source_tree: Path) -> None:
    run_setup(source_tree, "egg_info")
    (metadata,) = importlib.metadata.distributions(path=[str(source_tree)])
    assert metadata.version == __version__
    assert set(metadata.metadata["Requires-Python"].split(",")) == {">=3.9", "<3.13"}
    assert {"cpu", "gpu", "dev", "onnx", "nncf", "ray", "serve", *RUNTIMES} <= set(
        metadata.metadata.get_all("Provides-Extra")
    )
    required = [Requirement(line) for line in metadata.requires or ()]
    names = {canonical(requirement.name) for requirement in required}
    assert not names & {"paddleslim", "paddledet"}, "these two cannot be declared together"
    for python in PYTHONS:
        locks = ("serve", "gpu", "cpu", "dev", "nncf")
        locked = {name: version for lock in locks for name, version in pins(lock, python).items()}
        for requirement in required:
            if python == "3.9" and str(requirement.marker or "").endswith('"nncf"'):
                continue  # nncf 3.4 is for Python 3.10 and later
            if str(requirement.marker or "").endswith('"ray"'):
                continue  # must have the cluster's version
            version = locked[canonical(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version} in the lock"
    always = {canonical(requirement.name) for requirement in required if requirement.marker is None}
    assert LOWERING <= always, "INT8 on a CPU must come with `pip install .`"
    for name, packages in RUNTIMES.items():
        marked = [requirement for requirement in required if str(requirement.marker or "").endswith(f'"{name}"')]
        assert {canonical(requirement.name) for requirement in marked} == packages - always


def test_a_wheel_holds_the_whole_package(source_tree: Path, tmp_path: Path) -> None:
    run_setup(source_tree, "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "act_pipeline", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert {"act_pipeline/requirements/paddle3.txt", "act_pipeline/requirements/install.py"} <= packed
    assert "act_pipeline/doctor/command.py" in packed and "act_pipeline/engines/__init__.py" in packed
    assert {f"act_pipeline/{name}" if name.startswith("configs/") else name for name in tracked} <= packed
    assert not [
        name for name in packed if name.split("/")[0] not in ("act_pipeline", f"act_pipeline-{__version__}.dist-info")
    ]


def test_make_offers_what_the_documentation_names() -> None:
    offered = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = {
        "demo": "tools/demo.py",
        "test": '-m "not slow"',
        "test-quick": "tests/test_config.py",
        "test-all": "-m pytest",
        "lint": "-m mypy",
        "doctor": "-m act_pipeline.doctor",
        "lock": "requirements/lock.py",
        "clean": "rm -rf",
    }
    for target, command in commands.items():
        assert f"make {target} " in offered
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0 and command in dry.stdout, dry.stderr
        if target not in ("lock", "clean"):
            assert "requirements/install.py --venv .venv requirements/cpu.txt" in dry.stdout
    gpu = subprocess.run(["make", "-n", "demo", "LOCK=gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "requirements/gpu.txt" in gpu.stdout


@pytest.mark.parametrize(("glibc", "has"), [("2.28", False), ("2.34", False), ("2.35", True), ("2.36", True)])
def test_the_tests_get_triton_where_its_binaries_run(glibc: str, has: bool, tmp_path: Path) -> None:
    getconf = tmp_path / "getconf"
    getconf.write_text(f"#!/bin/sh\necho glibc {glibc}\n")
    getconf.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for target, wanted in (("test", has), ("test-all", has), ("demo", False)):
        dry = subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert ("requirements/serve.txt" in dry.stdout) == wanted, (target, dry.stdout)


def test_make_without_python_says_so_in_one_line() -> None:
    ended = subprocess.run(
        ["make", "-s", "env", "PYTHON=no-such-python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in ended.stderr.splitlines() if not line.startswith("make")]
    assert ended.returncode != 0 and len(said) == 1 and "no-such-python" in said[0] and "3.9 to 3.12" in said[0]


def test_ci_runs_what_a_newcomer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec make test </dev/null"
