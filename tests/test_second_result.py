"""``Strategy.search``: a search as the last step of a compression. What is refused before, and what remains after it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_fixtures import FP32_HASH, make_artifact, make_data
from sample_fixtures import scenes_in
from test_search import exported, row

from act_pipeline import compress as compress_package
from act_pipeline.cli.main import main
from act_pipeline.compress import Compressed
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import BelowFloor, Interrupted, UserError, run_command
from act_pipeline.core.records import SEARCH_FILENAME, SEARCH_SCHEMA, read_record, write_record
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import COMPRESS_CONFIG, READER_CONFIG, WEIGHTS
from act_pipeline.search import second_result as second
from act_pipeline.search.outcome import SearchOutcome

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    make_sample(folder, 4, 4, seed=0, size=64)
    return scenes_in(folder)


@pytest.fixture()
def reader_file(scenes: list[str], tmp_path: Path) -> Path:
    """A copy of the sample's reader with its data named in the file, for the command."""
    folder = scenes[0].partition("=")[2]
    lines = Path(READER_CONFIG).read_text(encoding="utf-8").splitlines()
    text = "\n".join(f"{line.partition('dataset_dir:')[0]}dataset_dir: {folder}" if "dataset_dir:" in line else line
                     for line in lines)  # fmt: skip
    path = tmp_path / "reader.yml"
    path.write_text(text, encoding="utf-8")
    return path


def found(rows, chosen: int | None, **more) -> SearchOutcome:
    picked = None if chosen is None else rows[chosen]
    return SearchOutcome(rows, picked, 0.005, 0.5, "openvino on CPU", {}, {"model_hash": FP32_HASH}, 64, **more)


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_off_unless_set() -> None:
    assert load_config(COMPRESS_CONFIG).strategy.search is False
    assert load_config(COMPRESS_CONFIG, ["Strategy.search=true"]).strategy.search is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["Strategy.search=soon"], "Strategy.search is the text 'soon', expected true or false"),
        (["Global.Evaluation=false", "Strategy={name: ptq, search: true}"], "is true, but Global.Evaluation is false"),
        (
            ["Global.Evaluation=agreement", "Strategy={name: ptq, search: true, min_agreement: 0.9}"],
            "is true, but Global.Evaluation is agreement: variants are chosen by their mAP",
        ),
        (["Strategy={name: ptq, max_drop: null, search: true}"], "is true, but Strategy.max_drop is empty"),
    ],
)
def test_what_the_search_needs_is_in_the_config(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(COMPRESS_CONFIG, overrides)
    assert "\n" not in str(error.value)


def test_the_search_is_no_part_of_what_a_checkpoint_belongs_to() -> None:
    from act_pipeline.compress.identity import training_identity

    identities = []
    for search in ("true", "false"):
        config = load_config(COMPRESS_CONFIG, [f"Strategy.search={search}"])
        reader = SimpleNamespace(settings=SimpleNamespace(reader=SimpleNamespace(batch_size=1, drop_last=False)))
        source = {"config": config.as_dict(), "source_hash": "", "data_hash": {}, "versions": {}}
        identities.append(training_identity(config, source, reader, "CPU"))
    assert identities[0] == identities[1] and identities[0]["Strategy"]["name"]


# --- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"record": None}, r"has no export\.json, expected a model of tools/export_model\.py"),
        ({"source_hash": "sha256:0"}, "which is missing or has changed since"),
        ({"config": "ppyoloe"}, "has no decoder layers and queries to leave out; tools/search.py --sizes tries other"),
        ({"file": True}, "is a file, expected a folder for the search"),
    ],
)
def test_a_model_that_cannot_be_searched_is_not_compressed(
    changes, message, reader_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compress_package, "compress", lambda *args, **more: pytest.fail("it was compressed"))
    record, more = changes.pop("record", 1), dict(changes)
    if more.get("config"):
        (tmp_path / "other.yml").write_text(f"architecture: PPYOLOE\nweights: {WEIGHTS}\n")
        more = {"config": str(tmp_path / "other.yml"), "overrides": []}
    if more.pop("file", False):
        (tmp_path / "int8.search").write_text("")
    model = exported(tmp_path / "model", **more)
    if record is None:
        (model.directory / "export.json").unlink()
    monkeypatch.setattr(second, "require_float", lambda model: None)  # there is no real program
    monkeypatch.setattr(second, "open_reader", lambda *args: (_Labelled(), ()))
    code = run_command(main, command(model, reader_file, tmp_path))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert re.search(message, said), said
    assert not (tmp_path / "int8").exists()


class _Labelled:
    def require_labels(self, split: str, use: str) -> None:
        pass


def test_images_without_labels_are_refused(sample_model: InferenceModel, reader_file: Path, tmp_path: Path) -> None:
    text = re.sub(
        r"(EvalDataset:\n) *!COCODataSet\n *image_dir: (.*)\n *anno_path: .*\n *dataset_dir: (.*)\n",
        r"\1  !ImageFolder\n    image_dir: \3/\2\n", reader_file.read_text(encoding="utf-8"),
    )  # fmt: skip
    reader_file.write_text(text, encoding="utf-8")
    config = load_config(
        COMPRESS_CONFIG,
        [f"Global.model_dir={sample_model.directory}", "Strategy={name: ptq, search: true}",
         f"Global.reader_config={reader_file}"],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"Strategy\.search is true, but .* has no labels, .*; or set it to false"):
        second.check_search(config, tmp_path / "int8")


def test_the_sample_can_be_searched(sample_model: InferenceModel, scenes: list[str], tmp_path: Path) -> None:
    config = load_config(COMPRESS_CONFIG, [f"Global.model_dir={sample_model.directory}", "Strategy.search=true"])
    second.check_search(config, tmp_path / "int8", scenes)


# --- the command -----------------------------------------------------------------------------------------------------


def command(model: InferenceModel, reader_file: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        "compress", "-c", str(COMPRESS_CONFIG), "--save_dir", str(folder / "int8"), "-o", "Strategy.search=true",
        f"Global.model_dir={model.directory}", f"Global.reader_config={reader_file}", *overrides,
    ]  # fmt: skip


@pytest.fixture()
def finished(sample_model, reader_file, tmp_path, monkeypatch):
    """Replace the compression of the command by one that has just written its result."""
    reader = make_data(tmp_path / "data")

    def compressed(config, save_dir, *args, **more) -> Compressed:
        shutil.rmtree(save_dir, ignore_errors=True)
        folder = make_artifact(Path(save_dir), reader)
        return Compressed(InferenceModel(folder), read_record(folder / "act.json", "act_pipeline.act/1"))

    monkeypatch.setattr(compress_package, "compress", compressed)
    monkeypatch.setattr(second, "write_report", lambda folder, reader, lang: written.append((Path(folder), lang)))
    written: list[tuple[Path, str]] = []
    return command(sample_model, reader_file, tmp_path), written


def searched(outcome: SearchOutcome, calls: list, error: BaseException | None = None):
    def search(config, save_dir, device, **more):
        calls.append((Path(save_dir), more["full_int8"].directory))
        if error is not None:
            raise error
        write_record(Path(save_dir) / SEARCH_FILENAME, SEARCH_SCHEMA, outcome.as_json())
        return outcome

    return search


def test_the_command_prints_a_second_result(finished, tmp_path, monkeypatch, capsys) -> None:
    arguments, written = finished
    rows = [row("b", 42, 0.5284), row("a", 50, 0.5331)]
    calls: list = []
    monkeypatch.setattr(second, "search", searched(found(rows, 0, full_int8="int8"), calls))
    assert run_command(main, arguments) == 0
    said = capsys.readouterr().out
    assert calls == [(tmp_path / "int8.search", tmp_path / "int8")]
    assert said.index("INT8 model, act.json and report.html:") < said.index("search for a faster variant")
    assert "the full model in INT8 is int8; the variants were calibrated with at most 64 images" in said
    assert said.splitlines()[-1] == (
        "second result: 640 x 640, b: 1.19 times as fast as the INT8 model above, mAP 0.5284 (-0.0016 against the float "
        "model): /m/b"
    )
    record = read_record(tmp_path / "int8" / SEARCH_FILENAME, SEARCH_SCHEMA)
    assert record["chosen"] == {"name": "b", "precision": "int8"} and record["full_int8"] == "int8"
    assert written == [(tmp_path / "int8", "en")]


def test_without_a_faster_variant_the_first_result_stands(finished, tmp_path, monkeypatch, capsys) -> None:
    arguments, written = finished
    rows = [row("b", 42, 0.4), row("a", 50, 0.5331)]
    monkeypatch.setattr(second, "search", searched(found(rows, 1), []))
    assert run_command(main, [*arguments, "Strategy.min_agreement=0.9"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "second result: none, no variant within max_drop 0.005 is faster"
    assert run_command(main, ["compress", "--lang", "none", *arguments[1:]]) == 0
    assert len(written) == 1


def test_no_search_unless_the_compression_is_within_max_drop(finished, monkeypatch, capsys) -> None:
    arguments, _ = finished
    calls: list = []
    monkeypatch.setattr(second, "search", searched(found([], None), calls))

    def below(*args, **more):
        raise BelowFloor("no INT8 model is within max_drop")

    monkeypatch.setattr(compress_package, "compress", below)
    assert run_command(main, arguments) == 3 and not calls


def test_no_search_unless_asked_for(finished, monkeypatch) -> None:
    arguments, _ = finished
    calls: list = []
    monkeypatch.setattr(second, "search", searched(found([], None), calls))
    assert run_command(main, [part for part in arguments if part != "Strategy.search=true"]) == 0 and not calls


def test_an_error_in_the_search_says_what_is_finished(finished, tmp_path, monkeypatch, capsys) -> None:
    arguments, _ = finished
    monkeypatch.setattr(second, "search", searched(found([], None), [], UserError("the disk is full")))
    assert run_command(main, arguments) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        f"error: the search for a faster variant: the disk is full; the INT8 model in {tmp_path / 'int8'} is finished"
    )
    assert "INT8 model, act.json" in said.out
    assert (tmp_path / "int8" / "act.json").exists() and not (tmp_path / "int8" / SEARCH_FILENAME).exists()


def test_a_signal_in_a_compression_of_the_search_says_what_is_finished(finished, tmp_path, monkeypatch, capsys) -> None:
    """The message of the inner compression, that nothing is saved, is replaced."""
    arguments, _ = finished
    error = Interrupted(signal.SIGTERM, "nothing is saved: start it again")
    monkeypatch.setattr(second, "search", searched(found([], None), [], error))
    assert run_command(main, arguments) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("interrupted: the search for a faster variant is not finished, the INT8 model in ")
    assert f"{tmp_path / 'int8'} is finished; tools/search.py with the same config and --save_dir=" in line


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_search_and_leaves_the_model(signum, inner, tmp_path) -> None:
    """In a process of its own; ``inner``: in a step that Python cannot end, of a compression of the search."""
    artifact = make_artifact(tmp_path / "int8", make_data(tmp_path / "data"))
    before = (artifact / "act.json").read_bytes()
    code = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
import act_pipeline
from act_pipeline.config import load_config
from act_pipeline.compress import Compressed
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import run_command
from act_pipeline.core.interruption import interruptible
from act_pipeline.search import second_result as second

def search(config, save_dir, device, **more):
    if not {inner}:
        print("searching", flush=True)
        time.sleep(60)
    with interruptible(lambda: "nothing is saved", grace_seconds=0.5) as interruption, interruption.held():
        print("searching", flush=True)
        while True:
            time.sleep(1)

second.search = search
done = Compressed(InferenceModel({str(artifact)!r}), {{}})
sys.exit(run_command(lambda argv: second.second_result(load_config({str(COMPRESS_CONFIG)!r}), done), []))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment)
    try:
        assert run.stdout is not None and run.stdout.readline() == "searching\n"
        time.sleep(0.2)
        run.send_signal(signum)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signum, said
    assert said.splitlines()[-1].startswith(
        f"interrupted: the search for a faster variant is not finished, the INT8 model in {artifact} is finished; "
    )
    assert (artifact / "act.json").read_bytes() == before and not (artifact / SEARCH_FILENAME).exists()


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sample_is_compressed_and_searched(sample_model: InferenceModel, tmp_path: Path, monkeypatch) -> None:
    """The full model's row is the compression's own result; the report has the variants."""
    from act_pipeline.compress import compress
    from act_pipeline.search import int8_models

    make_sample(tmp_path / "data", 24, 24, seed=0, size=256)
    overrides = scenes_in(tmp_path / "data")
    config = load_config(
        COMPRESS_CONFIG,
        [f"Global.model_dir={sample_model.directory}", "Strategy={name: ptq, max_drop: 0.1, search: true}",
         "QuantPost.calib_images=8"],
    )  # fmt: skip
    made: list[str] = []
    monkeypatch.setattr(
        int8_models, "compress",
        lambda config, folder, *args, **more: made.append(Path(folder).name) or compress(config, folder, *args, **more),
    )  # fmt: skip
    second.check_search(config, tmp_path / "int8", overrides)
    result = compress(config, tmp_path / "int8", "cpu", progress=False, reader_overrides=overrides)
    outcome = second.second_result(config, result, "cpu", progress=False, reader_overrides=overrides, report="en")
    assert "layers2_queries50_224x224" not in made and 1 <= len(made) <= 2
    full = next(one for one in outcome.rows if one.precision == "int8" and one.ratio == 1)
    assert full.folder == str(tmp_path / "int8") and full.map == pytest.approx(result.record["int8"]["map"], abs=1e-9)
    assert outcome.full_int8 == str(tmp_path / "int8") and outcome.calibration_images == 8
    report = json.loads((tmp_path / "int8" / "report.json").read_text())
    assert len(report["variants"]["rows"]) == len(outcome.rows) and report["variants"]["full_given"]
    assert 'id="variants"' in (tmp_path / "int8" / "report.html").read_text()
    assert (tmp_path / "int8.search" / "search.png").exists()
    assert second.second_result_lines(outcome, config)[-1].startswith("second result: ")
