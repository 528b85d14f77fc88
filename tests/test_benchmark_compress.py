"""The comparison with stock PaddleSlim: what is asked of both, how the seconds are counted, what is told."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.benchmark import compress_run
from act_pipeline.benchmark.compress_run import Clock, Request, compare, ratios
from act_pipeline.demo import COMPRESS_CONFIG, READER_CONFIG
from act_pipeline.errors import UserError
from act_pipeline.tables import compress_benchmark_table
from tools import benchmark_compress


def row(scale: float, failure: str | None = None) -> dict:
    seconds = {"prepare": 10 * scale, "train": 20 * scale, "evaluate": 0.0, "total": 30 * scale}
    return {"seconds": seconds, "failure": failure, "steps": 2, "loss": [1.0, 0.5], "evaluations": [0.25, 0.5]}


def test_ratios_are_stocks_seconds_over_ours_where_both_ran() -> None:
    assert ratios({"stock": row(5), "ours": row(1)}) == {"prepare": 5, "train": 5, "total": 5}
    assert ratios({"stock": row(5), "ours": row(1, "killed")}) == {}
    assert ratios({"ours": row(1)}) == {}


def test_the_table_has_a_ratio_and_says_what_failed() -> None:
    asked = {"eval_iter": 1, "eval_images": 50}
    rows = {"stock": row(5), "ours": row(1)}
    text = compress_benchmark_table({"rows": rows, "ratios": ratios(rows), "request": asked, "cpus": 2})
    assert re.search(r"total +150.0 +30.0 +5.0", text) and "stock: 2 iterations, mAP 0.2500, 0.5000" in text
    rows = {"stock": row(5), "ours": {"seconds": {}, "failure": "its process ended with 2: no memory"}}
    text = compress_benchmark_table({"rows": rows, "ratios": ratios(rows), "request": asked, "cpus": 2})
    assert "ours failed: its process ended with 2: no memory" in text and "  ratio" not in text


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
    assert training.target_metric is None and training.origin_metric is None


def test_a_side_that_fails_is_told_and_ends_with_one(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"seconds": {}, "failure": "its process ended with -9: out of memory"}
    monkeypatch.setattr(compress_run, "_run_side", lambda side, *more: failed if side == "ours" else row(5))
    options = [f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}"]
    assert benchmark_compress.main(["-o", *options, "--json", str(tmp_path / "record.json")]) == 1
    assert "ours failed: its process ended with -9: out of memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["rows"]["ours"] == failed


def readable(demo, directory: Path) -> Path:
    """Return the sample's reader, with the place of its data."""
    path = directory / "reader.yml"
    path.write_text(re.sub(r"dataset_dir: .*", f"dataset_dir: {demo.root / 'data'}", READER_CONFIG.read_text()))
    return path


@pytest.mark.slow
def test_stock_and_ours_run_side_by_side(demo, tmp_path: Path) -> None:
    options = (f"Global.model_dir={demo.fp32.directory}", f"Global.reader_config={readable(demo, tmp_path)}")
    record = compare(Request(str(COMPRESS_CONFIG), options, train_iter=4, eval_iter=2, eval_images=6), progress=False)
    stock, ours = record["rows"]["stock"], record["rows"]["ours"]
    assert stock["failure"] is None and ours["failure"] is None
    assert stock["steps"] == ours["steps"] == 4 and len(stock["evaluations"]) == len(ours["evaluations"]) == 2
    # The same images, weights and loss; stock rounds the teacher too.
    assert np.isclose(stock["loss"][0], ours["loss"][0], rtol=0.05)
    assert record["ratios"]["prepare"] > 3 and record["ratios"]["total"] > 1.5
