"""Comparisons with stock PaddleSlim and with NNCF: equal settings, how durations are measured, and the output."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import export_tiny_model

from act_pipeline.benchmark import nncf_peer
from act_pipeline.calibration.images import calibration_batches
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.records import read_record
from act_pipeline.data import Reader
from act_pipeline.demo import COMPRESS_CONFIG, READER_CONFIG
from act_pipeline.onnx_export import lowered_onnx
from tools.dev import benchmark_compress, compress_run, peer_run
from tools.dev.compress_run import Clock, Request, compare, compress_table, ratios


def row(scale: float, failure: str | None = None) -> dict:
    seconds = {"prepare": 10 * scale, "train": 20 * scale, "evaluate": 0.0, "total": 30 * scale}
    return {"seconds": seconds, "failure": failure, "steps": 2, "loss": [1.0, 0.5], "evaluations": [0.25, 0.5]}


def test_the_ratio_is_stocks_total_over_ours_if_both_ran() -> None:
    assert ratios({"stock": row(5), "ours": row(1)}) == {"total": 5}
    assert ratios({"stock": row(5), "ours": row(1, "killed")}) == {}
    assert ratios({"ours": row(1)}) == {}


def test_the_table_has_a_ratio_and_says_what_failed() -> None:
    asked = {"eval_iter": 1, "eval_images": 50}
    rows = {"stock": row(5), "ours": row(1)}
    text = compress_table({"rows": rows, "ratios": ratios(rows), "request": asked, "cpus": 2})
    assert re.search(r"total +150.0 +30.0 +5.0", text) and "stock: 2 iterations, mAP 0.2500, 0.5000" in text
    # A stage of one side alone is blank in the other's column; the total is the last row.
    rows["ours"] = {**row(1), "seconds": {"evaluate_fp32": 4.0, "other": 1.0, "total": 5.0}}
    text = compress_table({"rows": rows, "ratios": ratios(rows), "request": asked, "cpus": 2})
    table = text.splitlines()
    assert [line.split()[0] for line in table[2:8]] == [
        "prepare", "train", "evaluate", "evaluate_fp32", "other", "total"
    ]  # fmt: skip
    assert table[5].split() == ["evaluate_fp32", "4.0"] and table[7].split() == ["total", "150.0", "5.0", "30.0"]
    rows = {"stock": row(5), "ours": row(1)}
    rows = {"stock": row(5), "ours": {"seconds": {}, "failure": "its process ended with 2: no memory"}}
    text = compress_table({"rows": rows, "ratios": ratios(rows), "request": asked, "cpus": 2})
    assert "ours failed: its process ended with 2: no memory" in text and "  ratio" not in text


@pytest.mark.alone
def test_a_stage_within_another_stops_its_clock(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock("ours")
    with clock.stage("train"):
        time.sleep(0.05)
        with clock.stage("evaluate"):
            time.sleep(0.2)
    seconds = clock.row()
    assert 0.05 <= seconds["train"] < 0.15 and 0.2 <= seconds["evaluate"] < 0.3
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"), abs=0.01)
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["train", "evaluate"]


def test_a_records_seconds_are_added_under_the_names_of_the_stages() -> None:
    clock = Clock("ours", ())
    clock.add({"prepare": 1.0, "evaluate_fp32": 2.0, "evaluate_int8": 3.0}, {"evaluate_fp32": "evaluate"})
    clock.add({"prepare": 0.5})
    assert clock.seconds == {"prepare": 1.5, "evaluate": 2.0, "evaluate_int8": 3.0}


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"train_iter": 10, "eval_iter": 3}, "a divisor of --train_iter"), ({"eval_images": 0}, "--eval_images is 0")],
)
def test_what_stock_cannot_do_is_refused(asked: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Request(str(COMPRESS_CONFIG), **asked).load()


def test_both_train_alike_and_to_the_end() -> None:
    config = Request(str(COMPRESS_CONFIG), ("TrainConfig.target_metric=0.1",), 20, 5).load()
    training = config.train_config
    assert (config.strategy.name, config.strategy.max_drop) == ("qat_dis", None)
    assert (training.train_iter, training.eval_iter, training.epochs) == (20, 5, None)
    assert training.patience is None
    assert training.target_metric is None and training.origin_metric is None


def test_a_side_that_fails_is_told_and_ends_with_one(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"seconds": {}, "failure": "its process ended with -9: out of memory"}
    monkeypatch.setattr(compress_run, "run_side", lambda module, side, *more: failed if side == "ours" else row(5))
    options = [f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}"]
    assert benchmark_compress.main(["-o", *options, "--json", str(tmp_path / "record.json")]) == 1
    assert "ours failed: its process ended with -9: out of memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["rows"]["ours"] == failed


def readable(demo, directory: Path) -> Path:
    """Return the sample's reader with the location of its data."""
    path = directory / "reader.yml"
    path.write_text(re.sub(r"dataset_dir: .*", f"dataset_dir: {demo.root / 'data'}", READER_CONFIG.read_text()))
    return path


@pytest.mark.slow
@pytest.mark.alone
def test_stock_and_ours_run_side_by_side(demo, tmp_path: Path) -> None:
    places = (f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}")
    options = (*places, "Distillation.loss=soft_label")
    record = compare(Request(str(COMPRESS_CONFIG), options, train_iter=4, eval_iter=2, eval_images=6), progress=False)
    stock, ours = record["rows"]["stock"], record["rows"]["ours"]
    assert stock["failure"] is None and ours["failure"] is None
    # This package has one more evaluation, before the first step.
    assert stock["steps"] == ours["steps"] == 4 and len(stock["evaluations"]) == len(ours["evaluations"]) - 1 == 2
    # Same images, weights and loss, but PaddleSlim also rounds the teacher, and we start from calibrated scales.
    assert np.isclose(stock["loss"][0], ours["loss"][0], rtol=0.1)
    assert record["ratios"]["total"] > 1.5
    assert {"prepare", "evaluate_fp32", "train"} <= set(ours["seconds"]) and "fp32_map" in ours


# ---- NNCF's peer -----------------------------------------------------------------------------------------------------


def peer_rows() -> dict:
    def row(seconds: dict, **more) -> dict:
        seconds = peer_run.derive({**seconds, "total": sum(seconds.values())})
        return {"seconds": seconds, "failure": None, "chosen": "", "map": None, "bytes": None, **more}

    return {
        "nncf": row({"start": 2.0, "prepare": 1.0, "quantize": 10.0, "save": 1.0, "other": 0.5}, map=0.5, bytes=5e6),
        "ptq": row({"start": 1.0, "prepare": 2.0, "calibrate": 3.0, "quantize": 2.0, "evaluate": 8.0, "other": 0.5}),
        "auto": row(
            {"start": 1.0, "calibrate": 15.0, "choose": 4.0, "quantize": 1.0, "evaluate": 5.0},
            map=0.25,
            bytes=4e6,
            chosen="ptq:avg",
        ),
    }


def test_ours_are_measured_in_nncfs_seconds_with_and_without_the_evaluations() -> None:
    found = peer_run.peer_ratios(peer_rows())
    assert found["ptq"] == pytest.approx({"quantization": 5 / 10, "total - evaluate": 8.5 / 14.5, "total": 16.5 / 14.5})
    assert found["auto"]["quantization"] == pytest.approx(2.0)
    failed = {"seconds": {}, "failure": "killed"}
    assert list(peer_run.peer_ratios({**peer_rows(), "ptq": failed})) == ["auto"]
    assert peer_run.peer_ratios({**peer_rows(), "nncf": failed}) == {}


def test_the_table_of_the_peer_has_stages_ratios_and_scores() -> None:
    rows = {**peer_rows(), "fp32": {"seconds": {}, "failure": None, "chosen": "", "map": 0.75, "bytes": 16e6}}
    record = {
        "rows": rows,
        "ratios": peer_run.peer_ratios(rows),
        "request": {"eval_images": None},
        "calibration_images": 24,
        "cpus": 2,
    }
    lines = peer_run.peer_table(record).splitlines()
    assert re.fullmatch(r"seconds +nncf +ptq +auto +ptq / nncf +auto / nncf", lines[0])
    assert re.fullmatch(r"quantization +10.0 +5.0 +20.0 +0.50 +2.00", next(x for x in lines if "quantization" in x))
    assert [line.split()[0] for line in lines[2:11]] == [
        "start",
        "prepare",
        "quantize",
        "save",
        "calibrate",
        "evaluate",
        "choose",
        "other",
        "quantization",
    ]
    assert lines[-2].endswith("nncf 0.5000 (5.00 MB); auto 0.2500 (4.00 MB, ptq:avg); fp32 0.7500 (16.00 MB)")
    record["rows"]["nncf"] = {"seconds": {}, "failure": "its process ended with 2: no memory"}
    record["ratios"] = peer_run.peer_ratios(rows)
    text = peer_run.peer_table(record)
    assert "nncf failed: its process ended with 2: no memory" in text and "/ nncf" not in text


def test_nncf_calibrates_on_the_images_that_ours_calibrates_on(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def quantize(model, reader, images, path, batches, stage):
        seen["nncf"] = [int(batch["im_id"][0]) for batch in batches()]
        assert images == len(seen["nncf"])

    monkeypatch.setattr(nncf_peer, "import_nncf", lambda: None)
    monkeypatch.setattr(nncf_peer, "quantize", quantize)
    options = (f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}")
    config = peer_run.PeerRequest(str(COMPRESS_CONFIG), (*options, "QuantPost={calib_images: 7, seed: 3}")).load()
    reader = Reader.load(config.global_.reader_config)
    peer_run.run_nncf(config, reader, tmp_path, Clock("nncf", ()))
    ours = [int(index) for batch in calibration_batches(reader, config.quant_post, False)() for index in batch["im_id"]]
    assert len(set(ours)) == 7 and seen["nncf"] == ours


def test_the_peers_sides_differ_in_the_strategy_alone() -> None:
    request = peer_run.PeerRequest(str(COMPRESS_CONFIG), ("Strategy.max_drop=0.03", "QuantPost.calib_images=9"))
    nncf, ptq, auto = (request.load(side) for side in peer_run.SIDES)
    assert nncf == ptq and ptq.quant_post == auto.quant_post
    assert (ptq.strategy.name, ptq.strategy.max_drop) == ("ptq", None)
    assert (auto.strategy.name, auto.strategy.max_drop) == ("auto", 0.03)


def test_a_side_finds_no_onnx_file_that_another_lowered(tmp_path: Path) -> None:
    export_tiny_model(tmp_path / "model")
    model = InferenceModel.load(tmp_path / "model")
    lowered = lowered_onnx(model, "cpu").path
    copied = peer_run.own_copy(model, tmp_path / "side")
    assert copied.content_hash() == model.content_hash() and lowered.is_relative_to(model.directory)
    config = peer_run.PeerRequest(str(COMPRESS_CONFIG), (f"Global.model_dir={model.directory}",)).load("auto", copied)
    assert Path(config.global_.model_dir) == copied.directory
    assert not list(copied.directory.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peer", "nncf", "--only", "ours"], "--only=ours is a side of the training"),
        (["--no_map"], "--no_map has a meaning with --peer only"),
        (["--peer", "nncf"], "nncf is not installed.*requirements/nncf.txt"),
    ],
)
def test_flags_of_the_peer_that_cannot_be_are_one_line(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "nncf" else find(name, *more))
    assert run_command(benchmark_compress.main, flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(words, error)


@pytest.mark.slow
def test_nncf_ptq_and_auto_run_side_by_side(demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed (requirements/nncf.txt)")
    options = [f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}"]
    path = tmp_path / "record.json"
    assert (
        benchmark_compress.main(
            [
                "--peer",
                "nncf",
                "-o",
                *options,
                "QuantPost.calib_images=12",
                "Strategy.max_drop=0.2",
                "--eval_images",
                "8",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    rows = read_record(path, peer_run.PEER_SCHEMA)["rows"]
    assert all(row["failure"] is None for row in rows.values())
    assert all(abs(row["map"] - rows["fp32"]["map"]) < 0.2 for row in rows.values())
    assert all(rows[side]["bytes"] < 0.5 * rows["fp32"]["bytes"] for side in peer_run.SIDES)
    assert "auto / nncf" in capsys.readouterr().out
