"""Rounds, ratios, isolation, the record and the chart, with sleeping engines, and once with real ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from benchmark_fixtures import (
    FAIL_VARIABLE,
    LOG_VARIABLE,
    MACHINE,
    SLEEP_MS,
    fake_model,
    fake_summary,
    sleeping_engine,
    sleeping_support,
)
from inference_fixtures import TinyReader, export_tiny_model, make_tiny_data

from act_pipeline.benchmark import plan
from act_pipeline.benchmark.chart import draw_chart
from act_pipeline.benchmark.nncf_peer import LABELS as NNCF_LABELS
from act_pipeline.benchmark.plan import BenchmarkRequest
from act_pipeline.benchmark.rows import BenchmarkRecord
from act_pipeline.benchmark.run import run_benchmark
from act_pipeline.benchmark.timing import rounds, speed_ratio
from act_pipeline.benchmark.worker import UNTIMED_RUNS
from act_pipeline.cli.benchmark import parse_request
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.records import BENCHMARK_SCHEMA, read_record

LABELS = [f"{engine} {precision}" for engine, precision in SLEEP_MS]


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function that benchmarks sleeping engines."""
    monkeypatch.setattr(plan, "support", sleeping_support)
    monkeypatch.setattr(plan, "inspect_model", fake_summary)
    models = {
        "model_path": str(fake_model(tmp_path / "fp32", 400)),
        "int8_model_path": str(fake_model(tmp_path / "int8", 100)),
    }
    reader = TinyReader(make_tiny_data(tmp_path / "data"), tmp_path / "data" / "images")

    def run(**flags):
        request = BenchmarkRequest(**{**models, "quick": True, "cpu_threads": 1, "device": "CPU", **flags})
        return run_benchmark(request, say=lambda line: None, reader=reader, here=MACHINE, create=sleeping_engine)

    return run


def by_label(record) -> dict[str, dict]:
    return {row["label"]: row for row in record["rows"]}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory):
    """One run of all sleeping engines with every option: (outcome, folder)."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "support", sleeping_support)
        patch.setattr(plan, "inspect_model", fake_summary)
        patch.setenv(LOG_VARIABLE, str(folder / "log"))
        reader = TinyReader(make_tiny_data(folder / "data"), folder / "data" / "images")
        request = BenchmarkRequest(
            model_path=str(fake_model(folder / "fp32", 400)), int8_model_path=str(fake_model(folder / "int8", 100)),
            quick=True, repeats=12, warmup=2, cpu_threads=1, limit=4,
            json=str(folder / "out" / "benchmark.json"), chart=str(folder / "out" / "chart.png"),
        )  # fmt: skip
        return run_benchmark(request, lambda line: None, reader, MACHINE, sleeping_engine), folder


@pytest.mark.alone  # it creates the outcome that the tests below check
def test_times_and_ratios_are_those_of_the_engines(outcome) -> None:
    rows = by_label(outcome[0].record.as_json())
    assert set(rows) == set(LABELS)
    for (engine, precision), sleep_ms in SLEEP_MS.items():
        row = rows[f"{engine} {precision}"]
        assert sleep_ms <= row["latency_ms"]["min"] < sleep_ms + 3
        assert row["images_per_second"] == pytest.approx(1000 / row["latency_ms"]["mean"], rel=0.01)
    int8 = rows["openvino int8"]
    assert int8["ratio_to_fp32"]["to"] == "openvino fp32"
    assert int8["ratio_to_fp32"]["by_round"] == pytest.approx(2, rel=0.2)
    # Ratios to Paddle use the faster of its two engines: 12 ms, not 24.
    assert int8["ratio_to_paddle_fp32"]["to"] == "paddle_onednn fp32"
    assert int8["ratio_to_paddle_fp32"]["by_round"] == pytest.approx(3, rel=0.2)
    assert rows["paddle_onednn int8"]["ratio_to_fp32"]["of_p50"] == pytest.approx(2, rel=0.2)
    assert rows["openvino fp32"]["ratio_to_fp32"]["by_round"] == 1
    assert int8["device_latency_ms"]["p50"] == 2.0 and rows["paddle fp32"]["device_latency_ms"] is None


def test_engines_take_turns_one_at_a_time(outcome) -> None:
    lines = [line.rsplit(" ", 2) for line in (outcome[1] / "log").read_text(encoding="utf-8").splitlines()]
    spans = sorted((float(start), float(end), label) for label, start, end in lines)
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:])), "two engines computed at once"
    timed = [label for _, _, label in spans[len(LABELS) * (2 + 2) :]]  # after two loads and two warm-up runs
    runs = UNTIMED_RUNS + 1
    turns = [timed[index : index + runs] for index in range(0, 12 * len(LABELS) * runs, runs)]
    assert runs > 1 and all(len(turn) == runs and len(set(turn)) == 1 for turn in turns)
    orders = [
        tuple(turn[0] for turn in turns[start : start + len(LABELS)]) for start in range(0, len(turns), len(LABELS))
    ]
    assert orders == [tuple(labels) for labels in rounds(LABELS, 12, seed=0)]
    assert all(sorted(order) == sorted(LABELS) for order in orders) and len(set(orders)) > 6
    followers = {(before, after) for order in orders for before, after in zip(order, order[1:])}
    assert len(followers) > 3 * len(LABELS), "an engine always follows the same one"


def test_a_ratio_by_round_does_not_see_the_machine_slow_down() -> None:
    slowing = np.linspace(1, 9, 30)
    assert speed_ratio(0.2 * slowing, 0.1 * slowing, "x").by_round == 2
    # Measured one after the other, these two engines would have had the same latency.
    assert speed_ratio(0.2 * slowing[:15], 0.1 * slowing[15:], "x").of_p50 < 1


def test_the_record_has_all_of_it(outcome) -> None:
    path = outcome[1] / "out" / "benchmark.json"
    record = read_record(path, BENCHMARK_SCHEMA)
    assert record == {**json.loads(json.dumps(outcome[0].record.as_json())), "schema": BENCHMARK_SCHEMA}
    assert record["machine"]["cpu"] == "Test CPU"
    assert record["versions"]["sleep"] == "1.0" and record["versions"]["numpy"] == np.__version__
    settings = record["settings"]
    assert (settings["rounds"], settings["warmup"], settings["threads"], settings["batch_size"]) == (12, 2, 1, 1)
    assert record["models"]["fp32"]["bytes"] == 800 and record["models"]["int8"]["bytes"] == 200
    assert record["reader_hash"] == "sha256:test"
    row = by_label(record)["openvino int8"]
    assert set(row["latency_ms"]) == {"min", "p50", "p90", "p99", "max", "mean"}
    assert len(row["timings_ms"]) == 12 and median(row["timings_ms"]) == pytest.approx(
        row["latency_ms"]["p50"], rel=1e-3
    )
    assert row["model_bytes"] == 200 and by_label(record)["openvino fp32"]["model_bytes"] == 800
    assert row["settings"] == {"kernels": "none"} and row["failure"] is None and row["images"] == 4
    assert row["map"] > 0.9 and row["unsettled_runs"] == 0 and 0 < row["start_seconds"] < 5


def test_the_file_is_read_back_as_it_was_written(outcome) -> None:
    content = json.loads((outcome[1] / "out" / "benchmark.json").read_text(encoding="utf-8"))
    again = BenchmarkRecord.from_json(content)
    assert list(again.as_json()) == [name for name in content if name != "schema"]
    assert json.dumps({"schema": content["schema"], **again.as_json()}) == json.dumps(content)
    assert again.rows[0].memory == outcome[0].record.rows[0].memory and again.fp32 == outcome[0].record.fp32


def test_memory_is_that_of_the_engine_alone(outcome) -> None:
    memory = {label: row["memory"] for label, row in by_label(outcome[0].record.as_json()).items()}
    assert 150e6 < memory["openvino int8"]["engine_bytes"] < 170e6  # the memory that it allocates on purpose
    assert all(found["engine_bytes"] < 20e6 for label, found in memory.items() if label != "openvino int8")
    assert all(found["peak_bytes"] - found["engine_bytes"] == found["bare_bytes"] > 1e7 for found in memory.values())


def test_the_table_is_sorted_and_says_what_is_not_there(outcome) -> None:
    lines = outcome[0].lines
    start = next(index for index, line in enumerate(lines) if "ms p50" in line)
    table = lines[start].splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == sorted(
        LABELS, key=lambda label: SLEEP_MS[tuple(label.split(" "))]
    )
    assert "x Paddle: to paddle_onednn fp32, the faster of Paddle Inference's own that ran" in lines
    assert "not here: fp32 in onnxruntime: onnxruntime is not installed; install it" in lines
    assert all("\n" not in line for line in lines if line != lines[start])


def test_the_chart_shows_a_bar_a_row(outcome, tmp_path: Path) -> None:
    import cv2

    picture = cv2.imread(str(outcome[1] / "out" / "chart.png"))
    height, width, _ = picture.shape
    assert width == 1200 and height > 400
    fp32, int8 = (0x99, 0x99, 0x99), (0x00, 0x5E, 0xD5)  # BGR
    areas = {color: int((picture == color).all(axis=2).sum()) for color in (fp32, int8)}
    expected = sum(ms for (_, precision), ms in SLEEP_MS.items() if precision == "fp32") / sum(
        ms for (_, precision), ms in SLEEP_MS.items() if precision == "int8"
    )
    assert areas[fp32] / areas[int8] == pytest.approx(expected, rel=0.25)
    ink = (picture < 250).any(axis=2)
    assert not ink[:, -3:].any() and not ink[:3].any(), "something reaches out of the picture"
    record = outcome[0].record
    draw_chart(dataclasses.replace(record, rows=record.rows[:1]), tmp_path / "one.png")
    assert cv2.imread(str(tmp_path / "one.png")).shape[0] < height


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("load", "openvino int8 does not like this model"),
        ("run", "ZeroDivisionError: no more"),
        ("exit", "its process was ended by SIGKILL (out of memory?)"),
    ],
)
def test_an_engine_that_fails_is_a_row_with_its_reason(sleeping, monkeypatch, how: str, reason: str) -> None:
    monkeypatch.setenv(FAIL_VARIABLE, f"openvino_int8:{how}")
    ended = sleeping(precisions=("fp32", "int8"), engines=("openvino",), no_map=True, warmup=1, repeats=6)
    rows = by_label(ended.record.as_json())
    assert rows["openvino int8"]["failure"] == reason
    assert rows["openvino int8"]["latency_ms"] is None and rows["openvino int8"]["ratio_to_fp32"] is None
    assert rows["openvino fp32"]["failure"] is None and len(rows["openvino fp32"]["timings_ms"]) == 6
    assert f"failed: openvino int8: {reason}" in ended.lines
    assert [row.label for row in ended.record.rows] == ["openvino fp32", "openvino int8"]
    json.dumps(ended.record.as_json(), allow_nan=False)


def test_all_failing_is_an_error(sleeping, monkeypatch) -> None:
    monkeypatch.setenv(FAIL_VARIABLE, "openvino_int8:load,openvino_fp32:load")
    with pytest.raises(UserError, match="no engine could run: openvino fp32: openvino fp32 does not like this model; "):
        sleeping(engines=("openvino",), no_map=True)


def test_a_score_that_fails_leaves_the_times(sleeping, monkeypatch) -> None:
    monkeypatch.setenv(FAIL_VARIABLE, "openvino_int8:score")
    ended = sleeping(engines=("openvino",), warmup=0, repeats=2)
    rows = by_label(ended.record.as_json())
    assert rows["openvino int8"]["map"] is None and rows["openvino int8"]["latency_ms"]["p50"] > 3
    assert rows["openvino fp32"]["map"] > 0.9
    assert any(line.startswith("no mAP: openvino int8: the model found class 99") for line in ended.lines)


def test_only_a_float_model_is_float_rows_and_a_line(sleeping) -> None:
    ended = sleeping(int8_model_path=None, engines=("openvino",), no_map=True, random=True, warmup=0, repeats=1)
    assert [row.label for row in ended.record.rows] == ["openvino fp32"]
    assert "no --int8_model_path: float rows only" in ended.lines
    assert ended.record.settings.input == "random" and ended.record.rows[0].ratio_to_paddle_fp32 is None


def test_batches_count_as_images(sleeping) -> None:
    ended = sleeping(engines=("openvino",), precisions=("fp32",), no_map=True, batch_size=3, warmup=0, repeats=4)
    row = ended.record.as_json()["rows"][0]
    assert ended.record.settings.input_shape == [3, 3, 32, 32]
    assert row["images_per_second"] == pytest.approx(3000 / row["latency_ms"]["mean"], rel=0.01)


def test_an_engine_that_was_named_and_is_not_here_is_a_row(sleeping) -> None:
    ended = sleeping(engines=("openvino", "onnxruntime", "tensorrt"), no_map=True, warmup=0, repeats=1)
    assert by_label(ended.record.as_json())["onnxruntime fp32"]["failure"] == "onnxruntime is not installed; install it"
    assert "tensorrt has none of what is asked for on the CPU; it has fp16 on GPU" in ended.lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engines": ("onnxruntime",)}, "no engine can run here on the CPU: onnxruntime fp32: onnxruntime is not inst"),
        ({"precisions": ("fp16",)}, r"no engine has what is asked for on the CPU \(--precisions=fp16\); `make doctor`"),
        ({"precisions": ("int8",), "int8_model_path": None}, "no INT8 model to run: give --int8_model_path"),
        ({"model_path": "nowhere"}, "model folder nowhere does not exist"),
        ({"json": "."}, r"--json=\. is a folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(sleeping, flags, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sleeping(**{"no_map": True, "random": True, **flags})


def test_models_in_each_others_place(sleeping, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int8 is an INT8 model, expected an FP32 one; give it as --int8_model_path"):
        sleeping(model_path=str(tmp_path / "int8"))
    with pytest.raises(UserError, match="fp32 holds no INT8 scales, expected an INT8 model"):
        sleeping(int8_model_path=str(tmp_path / "fp32"))


def test_a_missing_data_set_points_to_random_input(sleeping, monkeypatch, tmp_path: Path) -> None:
    request = BenchmarkRequest(
        model_path=str(tmp_path / "fp32"), reader_config=str(tmp_path / "none.yml"), device="CPU", quick=True
    )
    with pytest.raises(UserError, match=r"none\.yml.*; or time on random input, without mAP: --random --no_map"):
        run_benchmark(request, lambda line: None, None, MACHINE, sleeping_engine)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--engines", "openvinno"],
            "unknown engine 'openvinno', expected some of paddle, .*; did you mean 'openvino'?",
        ),
        (["--precisions", "fp32,int9"], "unknown precision 'int9', expected some of .*; did you mean 'int8'?"),
        (["--repeats", "10"], "--repeats=10 is too few for a figure to rely on, expected at least 50; add --quick"),
        (["--repeats", "0"], "found '0', expected a whole number of at least 1"),
        (["--batchsize", "2"], "unknown flag '--batchsize'; did you mean '--batch_size'?"),
        (["--peer", "ncnf"], "unknown peer 'ncnf', expected nncf, nncf_accuracy_control; did you mean 'nncf'?"),
        (["--chart", "a.jpg"], "--chart=a.jpg: expected a name that ends in .png"),
        (["--engines", ","], "found ',', expected names with commas between them"),
    ],
)
def test_flags_say_what_is_wrong(argv, message: str, capsys) -> None:
    assert run_command(lambda argv: parse_request(argv) and 0, argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in message.split(".*"):
        assert part in said


def test_flags_make_a_request() -> None:
    request = parse_request(["--engines", "openvino, PADDLE", "--quick", "--device", "cpu", "--limit", "5"])
    assert request.engines == ("openvino", "paddle") and request.rounds == 10 and request.device == "CPU"
    assert parse_request([]) == BenchmarkRequest() and BenchmarkRequest().rounds == 50


def test_a_missing_peer_says_which_extra(sleeping, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else found(name, *rest))
    with pytest.raises(UserError, match=r"nncf is not installed; pip install \"act_pipeline\[nncf\]\", or -r requ"):
        sleeping(peer="nncf")


def test_paddle_for_real(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the command itself on the tiny model: stdout has the table and nothing else."""
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    from act_pipeline.cli import benchmark as command

    export_tiny_model(tmp_path / "fp32")
    export_tiny_model(tmp_path / "int8", quantized=True)
    capfd.readouterr()
    arguments = [
        "--model_path", str(tmp_path / "fp32"), "--int8_model_path", str(tmp_path / "int8"), "--random", "--no_map",
        "--engines", "paddle_onednn,paddle", "--precisions", "fp32", "--quick", "--repeats", "5", "--cpu_threads", "1",
        "--device", "CPU", "--batch_size", "2", "--json", str(tmp_path / "b.json"), "--chart", str(tmp_path / "b.png"),
    ]  # fmt: skip
    code = run_command(command.main, arguments)
    said, errors = capfd.readouterr()
    assert code == 0, errors
    assert len(said.splitlines()) == 10 and "paddle_onednn fp32" in said
    record = read_record(tmp_path / "b.json", BENCHMARK_SCHEMA)
    assert {row["label"] for row in record["rows"]} == {"paddle fp32", "paddle_onednn fp32"}
    for row in record["rows"]:
        assert row["failure"] is None and row["latency_ms"]["p50"] > 0 and row["memory"]["engine_bytes"] > 1e8
    assert record["versions"]["paddlepaddle"] and os.path.getsize(tmp_path / "b.png") > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nncf", "nncf_accuracy_control"])
def test_nncf_for_real(tmp_path: Path, name: str) -> None:
    """NNCF's INT8 of the tiny model is made, runs in OpenVINO and detects the object."""
    for package in ("paddle", "nncf", "openvino", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    export_tiny_model(tmp_path / "fp32")
    reader = TinyReader(make_tiny_data(tmp_path / "data"), tmp_path / "data" / "images")
    request = BenchmarkRequest(
        model_path=str(tmp_path / "fp32"), engines=("openvino",), precisions=("fp32",), device="CPU", quick=True,
        repeats=3, cpu_threads=1, peer=name, peer_images=4, work_dir=str(tmp_path / "peer"), batch_size=2,
    )  # fmt: skip
    rows = by_label(run_benchmark(request, lambda line: None, reader).record.as_json())
    peer = rows[NNCF_LABELS[name]]
    assert peer["failure"] is None and peer["made_seconds"] > 0
    assert peer["map"] == pytest.approx(rows["openvino fp32"]["map"], abs=0.05)
    assert peer["ratio_to_fp32"]["to"] == "openvino fp32"
    files = [tmp_path / "peer" / name for name in ("nncf_int8.xml", "nncf_int8.bin")]
    assert peer["model_bytes"] == sum(file.stat().st_size for file in files)
