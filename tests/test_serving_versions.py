"""Versions of a model: promotion, roll back, history, the audit log, and kills in the middle of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving_fixtures import Scene, audit_of, keep_detections, make_model

from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.serving import Repository, promote
from act_pipeline.serving.baseline import recorded_baseline
from act_pipeline.serving.repository import PointerWatch
from act_pipeline.serving.state import State, made_spare, promoted, rolled_back, switched_to_spare
from act_pipeline.serving.verdict import verdict_of


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {name: str(make_model(tmp_path / name, name)) for name in "abc"}


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(list(argv)) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_promote_canary_roll_back_and_history(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--repository", str(tmp_path / "repository")]
    assert "version 1: live\n" in run(capsys, "promote", *at, "--model_path", models["a"])
    said = run(capsys, "promote", *at, "--model_path", models["b"], "--share", "10")
    assert "version 2: 10% of the requests; version 1 has the rest\nverdict: within max_drop 0.005 (mAP drop" in said
    assert "version 2: 50% of the requests" in run(capsys, "promote", *at, "--version", "2", "--share", "50")
    # The same model keeps its number.
    assert "version 2: live" in run(capsys, "promote", *at, "--model_path", models["b"])
    assert "version 3: 1% of" in run(capsys, "promote", *at, "--model_path", models["c"], "--share", "1")
    assert run(capsys, "rollback", *at) == "version 3 is taken back; version 2 is live\n"
    assert run(capsys, "rollback", *at) == "version 2 is taken back; version 1 is live\n"
    assert "no earlier version to roll back to" in run(capsys, "rollback", *at, code=2)
    entries = audit_of(tmp_path / "repository")
    events = ["promote"] * 5 + ["roll_back"] * 2
    assert [entry["event"] for entry in entries] == events and [entry["change"] for entry in entries] == [*range(1, 8)]
    listed = run(capsys, "history", *at)
    assert listed.count("\n") == 8 and listed.endswith("now: version 1 has 100%\n")
    assert "version 2  live 1, 10% to 2  within max_drop" in listed
    assert [json.loads(line) for line in run(capsys, "history", *at, "--json", "--last", "2").splitlines()] == entries[
        -2:
    ]
    assert Repository.open(tmp_path / "repository").numbers() == [1, 2, 3]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("record", "act.json is missing: no compression evaluated this model"),
        ("weights", "the record of another model: the files were changed since"),
        ("json", "is no JSON"),
        (
            {"steps": [{"name": "x", "chosen": True, "meets_max_drop": False}]},
            "not within max_drop 0.005 .mAP drop 0.0020",
        ),
        ({"steps": []}, "not within max_drop 0.005"),
        ({"max_drop": None}, "max_drop and min_agreement are empty"),
        ({"evaluation": {"images": 0}}, "evaluated on no images"),
        ({"steps": 3}, "act.json is damaged"),
    ],
)
def test_what_did_not_pass_is_promoted_by_force_only(
    spoil, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "a", **(spoil if isinstance(spoil, dict) else {}))
    if spoil == "record":
        (model / "act.json").unlink()
    elif spoil == "weights":
        (model / "model.pdiparams").write_text("changed")
    elif spoil == "json":
        (model / "act.json").write_text("{")
    assert not verdict_of(InferenceModel.load(model)).passed
    command = ["promote", "--repository", str(tmp_path / "r"), "--model_path", str(model)]
    said = run(capsys, *command, code=2)
    assert re.search(words, said) and "or give --force" in said and said.count("\n") == 1
    assert not (tmp_path / "r" / "audit.jsonl").exists()
    assert "verdict: forced: " in run(capsys, *command, "--force")
    (entry,) = audit_of(tmp_path / "r")
    assert entry["forced"] and not entry["passed"] and re.search(words, entry["verdict"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["promote", "--model_path", "{a}", "--share", "20"], "--share is 20, expected one of 1, 10, 50, 100"),
        (["promote", "--model_path", "{a}", "--share", "10"], "no version is live .* first version with --share 100"),
        (["promote", "--model_path", "{a}/none"], "model folder .*none does not exist"),
        (["promote", "--version", "4"], "is no repository, expected a folder with live.json"),
        (["rollback"], "is no repository"),
        (["history"], "is no repository"),
        (["promote"], "one of the arguments --model_path --version is required"),
        (["promote", "--model_path", "{a}", "--reader_config", "none.yml"], "none.yml does not exist"),
        (["promote", "--model_path", "{a}", "--float_model", "none"], "model folder none does not exist"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], words: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argv[0], "--repository", str(tmp_path / "r"), *(word.format(**models) for word in argv[1:])]
    said = run(capsys, *arguments, code=2)
    assert re.match(f"error: .*{words}", said) and said.count("\n") == 1


def test_a_folder_of_something_else_is_not_made_a_repository(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds something else"):
        Repository.open(tmp_path, create=True)
    with pytest.raises(UserError, match="is a file"):
        Repository.open(Path(models["a"]) / "act.json")
    with pytest.raises(UserError, match="cannot make /proc/x"):
        Repository.open("/proc/x", create=True)


def test_a_damaged_pointer_is_one_line_and_a_watch_goes_on_with_the_last(
    models: dict[str, str], tmp_path: Path
) -> None:
    repository = Repository.open(tmp_path / "r", create=True)
    promote(repository, models["a"])
    watch = PointerWatch(repository)
    assert watch.state().live == 1
    for content in ("{", '{"schema": "x"}', '{"schema": "act_pipeline.live/1", "live": "1"}', "[]"):
        repository.pointer_path.write_text(content)
        with pytest.raises(UserError, match="live.json .*write it again from the last line of .*audit.jsonl"):
            repository.state()
        assert watch.state().live == 1
        with pytest.raises(UserError):
            PointerWatch(repository).state()


def test_a_watch_sees_a_change_of_another_process(models: dict[str, str], tmp_path: Path) -> None:
    repository = Repository.open(tmp_path / "r", create=True)
    watch = PointerWatch(repository)
    assert watch.state() == State()
    promote(repository, models["a"])
    assert watch.state().live == 1
    promote(repository, models["b"], 10)
    assert watch.state().shares() == {1: 90, 2: 10}


def test_the_states_of_versions() -> None:
    first = promoted(State(), 1, 100)
    both = promoted(first, 2, 10)
    with pytest.raises(UserError, match="version 2 has 10% of the requests; promote it to 100 or roll it back first"):
        promoted(both, 3, 100)
    with pytest.raises(UserError, match="version 1 is live already"):
        promoted(first, 1, 100)
    second = promoted(both, 2, 100)
    assert second.shares() == {2: 100} and second.previous == (1,) and second.change == 3
    assert rolled_back(both).shares() == {1: 100} and rolled_back(second).shares() == {1: 100}
    with pytest.raises(UserError, match="answers requests, expected another model as the spare one"):
        made_spare(second, 2)
    with pytest.raises(UserError, match="no spare version"):
        switched_to_spare(second)
    spare = switched_to_spare(promoted(made_spare(second, 3), 4, 1))
    assert spare.shares() == {3: 100} and spare.previous == (1, 2) and spare.automatic
    assert not promoted(spare, 2, 100).automatic
    assert rolled_back(promoted(second, 3, 10), automatic=True, both=True).shares() == {1: 100}


def test_a_version_has_the_figures_of_its_evaluation(models: dict[str, str], tmp_path: Path) -> None:
    scene, model = Scene(), Path(models["a"])
    detections = [scene.float_detections(number) for number in range(30)]
    detections[3] = detections[3][:0]
    keep_detections(model, detections)
    version, _ = promote(Repository.open(tmp_path / "r", create=True), model, category_ids=[2, 1, 0])
    found = Repository.open(tmp_path / "r").version(1).baseline
    assert found == version.baseline and found is not None
    every = np.concatenate(detections)
    assert found.images == 30 and found.empty == 1
    assert found.detections == pytest.approx((every[:, 1] > 0.3).sum() / 30)
    assert sum(found.scores) == (every[:, 1] >= 0.1).sum()
    # Category id 2 is class index 0.
    assert sum(found.classes[0]) == ((every[:, 0] == 2) & (every[:, 1] >= 0.1)).sum()
    with pytest.raises(UserError, match="category id 2, which the reader's annotations lack"):
        recorded_baseline(InferenceModel.load(model), [0, 1])
    assert recorded_baseline(InferenceModel.load(models["b"])) is None


def test_a_kill_at_any_moment_leaves_a_whole_repository(tmp_path: Path) -> None:
    """Before, in the middle of and after every call that changes the disk."""
    script = Path(__file__).with_name("serving_kills.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, torn, requests = map(int, re.findall(r"\d+", done.stdout))
    assert kills > 80 and torn >= 2 and requests > 0, done.stdout
