"""What a command does to files of the user that are where it is told to write, and to a Ctrl-C at a bad time."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from act_pipeline.cli.flags import add_opt
from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, run_command
from act_pipeline.core.output_folders import require_replaceable


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


@pytest.mark.parametrize("pressed", [True, False])
def test_an_import_that_swallows_ctrl_c_ends_as_ctrl_c(pressed: bool) -> None:
    """In a process of its own: a thread that an earlier test left in this one could answer the signal."""
    code = f"""
import signal
from act_pipeline.core.errors import run_command

def main(argv):
    try:
        if {pressed}:
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise ImportError("initialization failed")

raise SystemExit(run_command(main))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if pressed:
        assert done.returncode == EXIT_INTERRUPTED and done.stderr.startswith("interrupted: ")
    else:
        assert done.returncode == 1 and "ImportError: initialization failed" in done.stderr
