"""The flags of ``act-pipeline import``: what contradicts itself is one line, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from act_pipeline.cli import import_model
from act_pipeline.core.errors import run_command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--hf", "x", "--images", "y"], "--images goes with --onnx and --paddle3 only"),
        (["--paddle3", "x", "--family", "yolo"], "--family goes with --onnx only"),
        (["--onnx", "x.onnx", "--paddle3_python", "python"], "--paddle3_python goes with --paddle3 only"),
        (["--onnx", "x.onnx", "-c", "y.yml"], "-c goes with --pth only"),
        (["--pth", "x.pth"], "--pth needs -c"),
        (["--hf", "x", "--prompt", "a cat"], "--prompt goes with --onnx and --model_dir only"),
        (["--model_dir", "x"], "--model_dir needs --prompt"),
        (["--model_dir", "x", "--prompt", "a cat", "--output", "y"], "--output goes with an import only"),
        (["--onnx", "x.onnx", "--prompt", "a cat"], "x.onnx does not exist"),
        (["--onnx", "x.onnx", "--vocab", "vocab.txt"], "--vocab goes with --prompt only"),
        (["--onnx", "x.onnx", "--prompt", "a cat", "--class_phrase", "cat"], "expected CLASS=PHRASE"),
        (["--onnx", "x.onnx", "--prompt", "a cat", "--input_ids", "1,two"], "--input_ids is '1,two'"),
        (["--onnx", "x.onnx", "--input_shape", "images:1,3,a"], "--input_shape is 'images:1,3,a'"),
    ],
)
def test_contradictory_flags_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(import_model.main, arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]


def test_the_flag_of_an_output_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").write_text("x")
    assert run_command(import_model.main, ["--onnx", "x.onnx", "--output", str(tmp_path / "made")]) == 2
    assert "made is a file, expected a folder to write to; choose another --output\n" in capsys.readouterr().err
