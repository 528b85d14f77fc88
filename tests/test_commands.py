"""``act-pipeline``, its commands, and the scripts that stand for them in the repository."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

import act_pipeline.cli.eval as evaluate
from act_pipeline import __version__
from act_pipeline.cli.main import COMMANDS, main
from act_pipeline.config import load_config
from act_pipeline.core import fresh_process
from act_pipeline.core.command_names import SCRIPTS, name_commands
from act_pipeline.core.defaults import CONFIGS, find_shipped
from act_pipeline.core.errors import run_command
from act_pipeline.core.yaml_files import load_yaml
from act_pipeline.data import Reader
from act_pipeline.inference import InferenceOutcome
from act_pipeline.rtdetr import build_model

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a command where nothing says where the package is."""
    environment = {**os.environ, "COLUMNS": "100"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what ``act-pipeline NAME --help`` prints, with the program called PROG."""
    with contextlib.suppress(SystemExit):
        assert main([name, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and f"usage: act-pipeline {name} " in printed.out
    return " ".join(printed.out.replace(f"act-pipeline {name}", "PROG", 1).split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_flags_of_its_command(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    printed = run([sys.executable, str(ROOT / script), "--help"], tmp_path)
    assert printed.returncode == 0, printed.stderr
    name = Path(script).name
    assert " ".join(printed.stdout.replace(f"usage: {name}", "usage: PROG", 1).split()) == help_of(
        SCRIPTS[script], capsys
    )
    module = COMMANDS[SCRIPTS[script]][0]
    assert re.findall(r'run_module\("(.*)"\)', (ROOT / script).read_text()) == [module]


def test_the_doctor_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {*SCRIPTS.values(), "doctor"} == set(COMMANDS)
    monkeypatch.setenv("COLUMNS", "100")
    alone = run([sys.executable, "-m", "act_pipeline.doctor", "--help"], ROOT).stdout
    assert " ".join(alone.replace("python -m act_pipeline.doctor", "PROG", 1).split()) == help_of("doctor", capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_flags_and_gives_its_exit_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[object] = []

    def stand_in(argv: list[str]) -> int:
        received.extend([argv, sys.argv[0]])
        return 3

    monkeypatch.setattr(importlib.import_module(COMMANDS[name][0]), "main", stand_in)
    before = sys.argv
    assert main([name, "--some", "flag"]) == 3
    assert received == [["--some", "flag"], f"act-pipeline {name}"] and sys.argv is before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compres"], r"unknown command 'compres'; did you mean 'compress'\?; see act-pipeline --help"),
        (["x"], "unknown command 'x', expected one of export, import, compress, eval, "),
        ([], "no command is given, expected one of export, "),
        (["compress", "--save-dir", "x"], r"unknown flag '--save-dir'; did you mean '--save_dir'\?; see --help"),
        (["export"], "the following arguments are required: -c/--config; see --help"),
        (["analyze", "--images", "many"], "argument --images: invalid int value: 'many'; see --help"),
    ],
)
def test_what_is_no_command_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.match(f"error: {words}", printed.err) and printed.err.count("\n") == 1


def test_the_list_of_commands_imports_none_of_them(tmp_path: Path) -> None:
    source = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from act_pipeline.cli.main import main; main(['--help']); "
        "print([name for name in sys.modules if name.startswith(('paddle', 'numpy', 'act_pipeline.cli.'))])"
    )
    listed = run([sys.executable, "-c", source], tmp_path).stdout.splitlines()
    assert listed[-1] == "['act_pipeline.cli.main']"
    assert [line.split()[0] for line in listed if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize(
    ("module", "package"),
    [("google.protobuf", "protobuf"), ("google", "protobuf"), ("paddle", "paddlepaddle"), ("six", "six")],
)
def test_a_missing_package_is_one_line(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(argv: object) -> int:
        return len(importlib.import_module(module).__name__)

    monkeypatch.setattr("act_pipeline.cli.bundle.main", command)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["bundle"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: the package {package} is missing (") and len(said.splitlines()) == 1
    assert "-r requirements/cpu.txt" in said


@pytest.mark.parametrize("module", ["act_pipeline.none", "paddle.none", "none"])
def test_another_module_that_is_missing_is_a_bug(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_pipeline.cli.bundle.main", lambda argv: importlib.import_module(module))
    with pytest.raises(ModuleNotFoundError):
        main(["bundle"])


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"act-pipeline {__version__}\n"


def test_an_evaluation_goes_on_in_a_process_that_finds_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever door it came by, and wherever it runs."""
    again: list[str] = []

    def stand_in(request: object, rerun: list[str]) -> InferenceOutcome:
        again.extend(rerun)
        return InferenceOutcome(exit_code=4)

    monkeypatch.setattr(evaluate, "run_inference", stand_in)
    assert evaluate.main(["--limit", "3"]) == 4
    assert again[-2:] == ["--limit", "3"]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment = fresh_process.package_environment(SOME="thing")
    assert environment["SOME"] == "thing" and "SOME" not in os.environ
    ended = subprocess.run(
        [*again, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and ended.stdout.startswith("usage: act-pipeline eval "), ended.stderr
    assert run([*again, "--help"], tmp_path).returncode != 0, "it would find it anyway: the test shows nothing"


def test_what_is_installed_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "given")
    assert fresh_process.package_environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}given"
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(ROOT)])
    assert fresh_process.package_environment()["PYTHONPATH"] == "given"


def test_configs_of_the_repository_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/sample.yml") == CONFIGS / "sample.yml" == ROOT / "configs" / "sample.yml"
    assert find_shipped("configs/none.yml") == Path("configs/none.yml")
    config = load_config("configs/sample.yml")
    assert config.path == CONFIGS / "sample.yml"
    assert config.global_.reader_config == CONFIGS / "readers" / "sample_reader.yml"
    assert Reader.load("configs/readers/sample_reader.yml").path == CONFIGS / "readers" / "sample_reader.yml"
    assert build_model("configs/rtdetr/rtdetr_sample.yml").state_dict()

    base = "configs/rtdetr/rtdetr_r18vd_6x_coco.yml"
    (tmp_path / "mine.yml").write_text(f"_BASE_: [{base}]\nnum_classes: 3\n")
    assert load_yaml("mine.yml") == {**load_yaml(CONFIGS.parent / base), "num_classes": 3}

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sample.yml").write_text((CONFIGS / "sample.yml").read_text())
    assert load_config("configs/sample.yml").path == Path("configs/sample.yml")


def test_messages_name_what_there_is() -> None:
    text = "run `make demo`; python tools/compress.py, tools/report.py, /my/tools/report.py, deploy/infer_eval.py --x"
    assert name_commands(text) == text
    assert name_commands(text, installed=True) == (
        "run `act-pipeline demo`; act-pipeline compress, act-pipeline report, /my/tools/report.py, "
        "act-pipeline eval --x"
    )
    paddle = "run `make demo`, or install requirements/cpu.txt"  # it makes the environment, the command does not
    assert name_commands(paddle, installed=True) == paddle
    assert all((ROOT / script).is_file() for script in SCRIPTS)


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_a_command_without_a_config_says_which_it_took(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    searched = f", looked for in {tmp_path}, {CONFIGS} and {ROOT}; "
    assert main([command, "-o", "Global.model_dir=nowhere"]) == 2
    assert capsys.readouterr().err == (
        f"error: model folder nowhere does not exist, named by the default config, {CONFIGS / 'sample.yml'}: "
        f"Global.model_dir{searched}give yours with -c FILE, or run `make demo`, which makes the sample's model\n"
    )
    assert main([command, "-c", "configs/sample.yml", "-o", "Global.model_dir=nowhere"]) == 2
    assert searched + "export a model with tools/export_model.py first, or correct it" in capsys.readouterr().err
    assert main([command, "-o", "Global.model_dir=.", "Global.reader_config=nowhere.yml"]) == 2
    assert "error: reader nowhere.yml does not exist, named by the default config, " in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([command, "-o", "Global.model_dir=empty"]) == 2
    default, error = capsys.readouterr().err.splitlines()
    assert default == f"config: {CONFIGS / 'sample.yml'}, the default; -c FILE gives another"
    assert error.startswith("error: empty/model.pdmodel is missing")
    assert main([command, "-c", "configs/sample.yml", "-o", "Global.model_dir=empty"]) == 2
    assert capsys.readouterr().err.splitlines() == [error]


def test_all_scripts_find_the_package_the_same_way() -> None:
    assert (ROOT / "tools" / "_clone.py").read_text() == (ROOT / "deploy" / "_clone.py").read_text()
    scripts = [path for folder in ("tools", "deploy") for path in (ROOT / folder).glob("[a-z]*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in scripts} > set(SCRIPTS)
    assert all("from _clone import" in path.read_text() and "sys." not in path.read_text() for path in scripts)


def test_an_interrupt_with_a_traceback_in_its_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Paddle's translation of layers puts the traceback of what it interrupts into the message."""

    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt('In transformed code:\n\n    File "meta_arch.py", line 60\n\n    KeyboardInterrupt')

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "interrupted: nothing half-written is left behind\n"
