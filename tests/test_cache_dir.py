"""Machines with few writable folders: no home folder, a read-only one, a read-only cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from act_pipeline.core.cache_dir import cache_directory, is_writable, provide_home, readable_caches, temporary_directory
from act_pipeline.core.errors import run_command

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with no variables set, a temporary folder per test, and folders named ``read-only`` that are read-only."""
    for name in ("ACT_PIPELINE_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HOME"):
        monkeypatch.setenv(name, "")  # variables that were unset are restored as unset
        monkeypatch.delenv(name)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    access = os.access

    # The tests may run as root, who is denied no permission.
    def denied(path, mode, **options):
        return access(path, mode, **options) and not (mode & os.W_OK and "read-only" in Path(path).parts)

    monkeypatch.setattr(os, "access", denied)
    return tmp_path


def test_what_is_asked_for_comes_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(machine / "home"))
    assert cache_directory() == machine / "home" / ".cache" / "act_pipeline"
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "xdg"))
    assert cache_directory() == machine / "xdg" / "act_pipeline"
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(machine / "read-only" / "named"))
    assert cache_directory() == machine / "read-only" / "named"


def test_where_home_cannot_be_written_to_a_temporary_folder_is_taken(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = machine / "read-only"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    found = cache_directory()
    assert found == machine / "temporary" / f"act_pipeline_{os.getuid()}" and is_writable(found)
    assert found.stat().st_mode & 0o077 == 0
    assert readable_caches() == [found, home / ".cache" / "act_pipeline"]
    provide_home()
    assert os.environ["HOME"] == str(home) and os.environ["MPLCONFIGDIR"] == str(found / "matplotlib")


def test_a_user_without_home_gets_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.environ.get("HOME", path))  # no entry in /etc/passwd
    with pytest.raises(RuntimeError):
        Path.home()
    provide_home()
    assert Path.home() == temporary_directory() and "MPLCONFIGDIR" not in os.environ


def test_a_temporary_folder_of_somebody_else_is_not_taken(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path(tempfile.gettempdir(), f"act_pipeline_{os.getuid()}")
    usual.symlink_to(machine)
    assert temporary_directory() not in (usual, machine)
    usual.unlink()
    usual.mkdir()
    usual.chmod(0o777)
    assert temporary_directory() != usual
    usual.chmod(0o700)
    assert temporary_directory() == usual


def test_a_file_in_the_way_is_no_cache(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "home").write_bytes(b"")
    assert not is_writable(machine / "home" / ".cache")


def test_weights_in_a_cache_that_cannot_be_written_to_are_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container image that was built with the weights and runs read-only."""
    from act_pipeline.core import downloads
    from act_pipeline.core.hashing import hash_files

    home = machine / "read-only"
    monkeypatch.setenv("HOME", str(home))
    folder = home / ".cache" / "act_pipeline" / "weights"
    folder.mkdir(parents=True)
    (folder / "m.pdparams").write_bytes(b"weights")
    digest = hash_files([folder / "m.pdparams"]).partition(":")[2]
    (folder / "m.pdparams.sha256").write_text(f"{digest} https://host.invalid/m.pdparams\n", encoding="utf-8")
    monkeypatch.setattr(downloads, "_download", lambda *_: pytest.fail("downloaded again"))
    assert downloads.fetch("https://host.invalid/m.pdparams") == folder / "m.pdparams"


@pytest.mark.parametrize("module", ["matplotlib", "ppdet"])
def test_packages_that_need_a_home_are_imported_without_one(module: str, tmp_path: Path) -> None:
    """As in containers with a uid without an entry in /etc/passwd and without $HOME."""
    code = (
        "import pwd\n"
        "def nobody(*_): raise KeyError('no such uid')\n"
        "pwd.getpwuid = pwd.getpwnam = nobody\n"
        f"import act_pipeline\nfrom act_pipeline.core.paddledet import import_ppdet\n"
        f"import matplotlib; matplotlib.get_configdir()\nimport_ppdet() if {module!r} == 'ppdet' else None\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "MPLCONFIGDIR")}
    environment.update(TMPDIR=str(tmp_path), PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_temporary_folder_at_all_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert run_command(lambda argv: bool(tempfile.mkdtemp())) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "set TMPDIR" in error


def test_an_output_place_under_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "notes.txt"
    place.write_text("")
    for path in (place, place / "deeper"):
        assert run_command(lambda argv, path=path: path.mkdir() or 0) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "a file is there, expected a folder; choose another place" in line
