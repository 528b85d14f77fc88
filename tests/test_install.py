"""requirements/install.py and lock.py: what they install, and do not install again, with small packages made here."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """Import a script of requirements/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", ROOT / "requirements" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load("install")
lock = load("lock")


def make_wheel(folder: Path, version: str) -> str:
    """Write a wheel of the package `tiny`; return its lock line."""
    info = f"tiny-{version}.dist-info"
    path = folder / f"tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return f"tiny=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def test_a_lock_is_installed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_USER", "1")  # a user setting that must not redirect the installation out of the environment
    environment, pinned = tmp_path / "environment", tmp_path / "cpu.txt"
    command = ["--venv", str(environment), str(pinned)]

    def installed() -> str:
        python = environment / "bin" / "python"
        return subprocess.run(
            [python, "-c", "import tiny; print(tiny.version)"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    pinned.write_text(make_wheel(tmp_path, "1.0"))
    assert install.main(command) == 0 and installed() == "1.0"
    said = capfd.readouterr().out
    assert "making" in said and "installing 1 packages" in said

    assert install.main(command) == 0
    assert capfd.readouterr() == ("", "")  # nothing to do, no output

    pinned.write_text(make_wheel(tmp_path, "2.0"))
    assert install.main(command) == 0 and installed() == "2.0"
    assert "making" not in capfd.readouterr().out

    pinned.write_text(make_wheel(tmp_path, "2.1")[:-8] + "0000000\n")  # a file that differs from the locked one
    assert install.main(command) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and "cpu.txt" in error and str(environment / "install.log") in error
    assert install.main(command) == 2, "a failed installation must not count as done"

    pinned.write_text(make_wheel(tmp_path, "2.1"))
    assert install.main(command) == 0 and installed() == "2.1"

    capfd.readouterr()
    other = tmp_path / "gpu.txt"  # the other paddlepaddle package has the same files, so a new environment is needed
    other.write_text(make_wheel(tmp_path, "3.0"))
    assert install.main(["--venv", str(environment), str(other)]) == 0 and installed() == "3.0"
    assert "making it anew" in capfd.readouterr().out
    assert list(json.loads((environment / ".installed.json").read_text())) == ["gpu.txt"]


def test_an_environment_whose_python_is_gone_is_not_taken_for_made(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / ".installed.json").write_text('{"cpu.txt": "abc"}')
    assert install.read_stamp(tmp_path) == {}
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "removed")
    assert install.read_stamp(tmp_path) == {}
    (tmp_path / "bin" / "python").unlink()
    (tmp_path / "bin" / "python").touch()
    assert install.read_stamp(tmp_path) == {"cpu.txt": "abc"}
    (tmp_path / ".installed.json").write_text('{"cpu.t')
    assert install.read_stamp(tmp_path) == {}


def test_pythons_that_the_locks_serve() -> None:
    served = [version for version in ((3, 8), (3, 9), (3, 12), (3, 13)) if install.is_supported(version)]
    assert served == [(3, 9), (3, 12)]


def test_a_python_that_does_not_fit_gives_way_to_one_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 13, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(install.InstallError, match=r"expected 3\.9 to 3\.12.*make PYTHON="):
        install.find_python()
    stub, works = tmp_path / "python3.11", tmp_path / "python3.12"
    stub.write_text("#!/bin/sh\nexit 127\n")  # a version manager's stub for a Python that is not installed
    stub.chmod(0o755)
    works.write_text("#!/bin/sh\nexit 0\n")
    works.chmod(0o755)
    assert install.find_python() == str(works)


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho \"No module named 'ensurepip'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(install.InstallError, match=r"ensurepip.*apt-get install python3-venv"):
        install.make_venv(str(python), tmp_path / "environment")


def test_a_missing_lock_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["--venv", str(tmp_path / "environment"), str(tmp_path / "cpu.txt")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "cpu.txt is missing" in error and "make lock" in error


def test_no_write_permission_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "cpu.txt").write_text("")
    assert install.main(["--venv", str(tmp_path / "file" / "environment"), str(tmp_path / "cpu.txt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_platforms_are_refused_before_anything_is_made(
    system: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.platform, "system", lambda: system[0])
    monkeypatch.setattr(install.platform, "machine", lambda: system[1])
    (tmp_path / "cpu.txt").write_text("tiny==1.0\n")
    assert install.main(["--venv", str(tmp_path / "environment"), str(tmp_path / "cpu.txt")]) == 2
    assert "expected Linux on x86_64" in capsys.readouterr().err and not (tmp_path / "environment").exists()


def test_the_installer_can_be_read_by_an_old_python() -> None:
    """It must report that the Python is too old, instead of failing with a syntax error."""
    source = (ROOT / "requirements" / "install.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]


def test_a_lock_loses_the_marker_that_holds_for_all() -> None:
    platform = "implementation_name == 'cpython' and platform_machine == 'x86_64' and sys_platform == 'linux'"
    text = (
        f"a==1 ; python_full_version < '3.13' and {platform} \\\n    --hash=sha256:00\n"
        f"b==2 ; python_full_version >= '3.10' and python_full_version < '3.13' and {platform} \\\n"
        f"c==3 ; python_full_version < '3.10' and {platform}\n"
    )
    assert lock.shorten_markers(text) == (
        "a==1 \\\n    --hash=sha256:00\nb==2 ; python_full_version >= '3.10' \\\nc==3 ; python_full_version < '3.10'\n"
    )


def test_a_lock_that_cannot_be_made_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "requirements"
    folder.mkdir()
    (folder / "cpu.txt").write_text("old\n")
    monkeypatch.setattr(lock, "FOLDER", folder)
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    failing = tmp_path / "uv"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    assert lock.main(["--uv", str(failing)]) == 1
    assert "requirements/cpu.in has no solution" in capsys.readouterr().err
    assert (folder / "cpu.txt").read_text() == "old\n" and os.listdir(folder) == ["cpu.txt"]
