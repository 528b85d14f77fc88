"""What a command does to files of the user that are where it is told to write, and where nothing can be written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from act_pipeline.cli.flags import add_opt
from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import EXIT_USER_ERROR, UserError, run_command
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import new_artifact, require_replaceable


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
