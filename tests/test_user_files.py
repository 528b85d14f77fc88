"""What a command does to files of the user that are where it is told to write, and where nothing can be written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from act_pipeline.cli.flags import add_opt
from act_pipeline.cli.main import main
from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import OnnxModel
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import EXIT_USER_ERROR, UserError, run_command
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import clear_leftovers, new_artifact, require_replaceable
from act_pipeline.core.output_places import require_writable_file, require_writable_folder
from act_pipeline.engines.tensorrt.plan import build_plan


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    require_replaceable(mine, "act.json", "--save_dir")
    mine.mkdir()
    require_replaceable(mine, "act.json", "--save_dir")
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine holds notes.txt and no act.json: .* choose another --save_dir"):
        require_replaceable(mine, "act.json", "--save_dir")
    (mine / "act.json").write_text("{}")
    require_replaceable(mine, "act.json", "--save_dir")


@pytest.mark.parametrize("suffix", ["", ".below_max_drop"])
def test_compress_refuses_it_before_any_work(suffix: str, tmp_path: Path) -> None:
    """The float model's own folder among them, which has no act.json."""
    notes = tmp_path / f"out{suffix}" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(UserError, match="would be replaced as a whole"):
        compress(load_config(CONFIGS / "sample.yml", [f"Global.model_dir={tmp_path / 'none'}"]), tmp_path / "out")
    assert notes.read_text() == "mine"


def test_settings_of_every_o_count() -> None:
    parser = argparse.ArgumentParser()
    add_opt(parser, "")
    assert parser.parse_args(["-o", "a=1", "-o", "b=2", "c=3"]).opt == ["a=1", "b=2", "c=3"]
    assert parser.parse_args([]).opt == []


def test_a_folder_where_a_file_is_to_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def main(argv: object) -> int:
        write_text_atomically(tmp_path / "folder", "text")
        return 0

    (tmp_path / "folder").mkdir()
    assert run_command(main) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "a folder is there, expected a file" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y"])
def test_a_file_system_that_takes_no_folders_is_one_line(place: str) -> None:
    """mkdir says there that no such file exists, which elsewhere is a bug."""
    for write in (hold_lock, new_artifact):
        with pytest.raises(UserError, match=f"cannot make {place}: its file system takes no new files"), write(place):
            pass
    with pytest.raises(UserError, match=f"cannot make {place}"):
        write_text_atomically(place, "text")
    for check in (
        lambda: require_replaceable(place, "act.json", "--o"),
        lambda: require_writable_file(place, "--o", "a"),
    ):
        with pytest.raises(UserError, match=f"--o={place}: no file can be written to /proc .*; choose another place"):
            check()


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old.tar").write_text("old")
    require_writable_file(tmp_path / "old.tar", "--output", "new.tar")
    require_writable_file(tmp_path / "a" / "b" / "new.tar", "--output", "new.tar")
    require_writable_folder(tmp_path / "a", "--output")
    require_writable_folder(tmp_path, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["old.tar"]
    with pytest.raises(UserError, match=f"--output={tmp_path} is a folder, expected a file name such as .*/new.tar"):
        require_writable_file(tmp_path, "--output", "new.tar")
    with pytest.raises(UserError, match="old.tar is a file, expected a folder to write to; choose another --output"):
        require_writable_folder(tmp_path / "old.tar", "--output")


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match=f"--json={tmp_path / name} is a device or a pipe, .* such as eval.json"):
            require_writable_file(tmp_path / name, "--json", "eval.json")
        with pytest.raises(UserError, match=f"{tmp_path / name} is a device or a pipe"):
            write_text_atomically(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "disk" / "int8").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "int8")
    (tmp_path / "disk" / ".int8.killed00").mkdir()
    clear_leftovers(tmp_path / "link")
    with new_artifact(tmp_path / "link") as staging:
        (staging / "act.json").write_text("{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "int8" / "act.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["int8"]


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    said = f"{tmp_path / 'link'} is a link to nothing, expected a folder"
    with pytest.raises(UserError, match=said):
        require_writable_file(tmp_path / "link" / "a" / "model.onnx", "--output", "model.onnx")
    with pytest.raises(UserError, match=said):
        require_writable_folder(tmp_path / "link", "--output_dir")
    with pytest.raises(UserError, match=said):
        require_replaceable(tmp_path / "link", "act.json", "--save_dir")


def test_an_empty_file_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["onnx", "--model_path=none", "--output="]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: --output is empty, expected a file name such as model.onnx\n"


# There is no model for any of them, which would be the next thing to be said.
_CONFIG = ["-c", str(CONFIGS / "sample.yml"), "-o", "Global.model_dir=."]


@pytest.mark.parametrize(
    ("command", "flag", "name"),
    [
        (["bundle", "--model_path=none", "--target=t4"], "--output", "t4.tar"),
        (["onnx", "--model_path=none"], "--output", "model.onnx"),
        (["onnx", "--model_path=none"], "--output_dir", "models"),
        (["triton-repository", "--model_path=none"], "--output", "repository"),
        (["import", "--onnx=none.onnx"], "--output", "model"),
        (["search", *_CONFIG, "Strategy.max_drop=0.01"], "--save_dir", "search"),
        (["compress", *_CONFIG], "--save_dir", "int8"),
        (["analyze", *_CONFIG], "--output_dir", "analysis"),
        (["eval", "--model_path=none"], "--json", "eval.json"),
        (["eval", "--model_path=none", "--image_file=none.jpg"], "--output_dir", "drawn"),
        (["benchmark", "--model_path=none"], "--json", "benchmark.json"),
    ],
)
def test_a_place_in_a_file_is_refused_before_any_work(
    command: list[str], flag: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main([*command, f"{flag}={tmp_path / 'mine' / name}"]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag}={tmp_path / 'mine' / name}") and len(said.splitlines()) == 1
    assert f": {tmp_path / 'mine'} is a file, expected a folder; choose another place" in said


def test_so_is_that_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    model = OnnxModel(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="mine is a file, expected a folder"):
        build_plan(model, tmp_path / "mine" / "model.plan")
    with pytest.raises(UserError, match=f"--output={tmp_path} is a folder, .* such as {tmp_path / 'model.plan'}"):
        build_plan(model, tmp_path)


def test_a_folder_named_as_a_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t4.tar").mkdir()
    assert main(["bundle", "--model_path=none", "--target=t4", f"--output={tmp_path / 't4.tar'}"]) == EXIT_USER_ERROR
    assert "t4.tar is a folder, expected a file name such as " in capsys.readouterr().err
