"""Throughput under load: bursts, parallel requests of the runtimes, and ``deploy/benchmark.py --throughput``."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from benchmark_fixtures import FAIL_VARIABLE, MACHINE, fake_model, fake_summary, sleeping_engine, sleeping_support
from inference_fixtures import SIZE, TinyReader, export_tiny_model, make_tiny_data

from act_pipeline.benchmark import plan
from act_pipeline.benchmark.plan import BenchmarkRequest
from act_pipeline.benchmark.rows import BenchmarkRecord
from act_pipeline.benchmark.run import run_benchmark
from act_pipeline.benchmark.throughput import default_requests
from act_pipeline.cli.benchmark import parse_request
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import BENCHMARK_SCHEMA, read_record
from act_pipeline.engines import create_engine
from act_pipeline.engines.interface import parallel_requests
from act_pipeline.evaluation.throughput import MIN_RUNS, measure_throughput
from act_pipeline.inference import InferenceRequest, run_inference

RUNTIMES = ("openvino", "onnxruntime")


class CountingEngine:
    """Sleeps, and counts its runs and how many of them there were at the same time."""

    def __init__(self, seconds: float = 0.01, fails_at: int | None = None) -> None:
        self.lock, self.now, self.most, self.runs = threading.Lock(), 0, 0, 0
        self.seconds, self.fails_at = seconds, fails_at

    def run(self, inputs):
        with self.lock:
            self.now, self.runs = self.now + 1, self.runs + 1
            self.most = max(self.most, self.now)
            if self.runs == self.fails_at:
                raise UserError("no more")
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        return {}


def batches(size: int) -> list[dict[str, np.ndarray]]:
    return [{"image": np.zeros((size, 3, 4, 4), np.float32)}] * 2


# --- a burst ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 4])
def test_a_burst_keeps_its_requests_running(requests: int) -> None:
    engine = CountingEngine(0.01)
    burst = measure_throughput(engine, batches(2), requests, 0.2, warmup=2)
    assert engine.most == requests
    assert len(burst.latencies) == engine.runs - 2 * requests and burst.images == 2 * len(burst.latencies)
    assert min(burst.latencies) >= 0.01 and burst.seconds >= 0.2
    # Each request runs without a break: the durations of all runs fill the time.
    assert sum(burst.latencies) > 0.5 * requests * burst.seconds
    assert burst.images_per_second == burst.images / burst.seconds


def test_a_slow_engine_runs_a_few_times_all_the_same() -> None:
    assert len(measure_throughput(CountingEngine(0.02), batches(1), 2, 0.001).latencies) == 2 * MIN_RUNS


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_run_that_fails_ends_the_burst(fails_at: int) -> None:
    """In the warm-up too, where the other requests wait for the one that failed."""
    with pytest.raises(UserError, match="no more"):
        measure_throughput(CountingEngine(0.01, fails_at), batches(1), 2, 0.05)


# --- the runtimes ----------------------------------------------------------------------------------------------------


def images(count: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "image": random.random((1, 3, SIZE, SIZE), np.float32),
            "im_shape": np.float32([[SIZE, SIZE]]),
            "scale_factor": np.float32([[1, 1]]),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    return export_tiny_model(tmp_path_factory.mktemp("models") / "fp32")


@pytest.mark.parametrize("name", RUNTIMES)
def test_parallel_requests_give_what_one_gives(float_model, name: str) -> None:
    for package in (name, "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    feeds = images(24)
    alone = create_engine(name, float_model, threads=2)
    several = create_engine(name, float_model, threads=2, requests=3)
    assert parallel_requests(alone) == 1 and parallel_requests(several) == 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(several.run, feeds))
    for feed, outputs in zip(feeds, found):
        np.testing.assert_allclose(outputs["bbox"], alone.run(feed)["bbox"], atol=1e-5)
    assert several.settings["requests"] == "3" and "requests" not in alone.settings
    several.close()
    several.close()


def test_openvino_says_how_many_requests_and_divides_its_threads(float_model, monkeypatch) -> None:
    for package in ("openvino", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import openvino

    seen: list[dict] = []

    class RecordingCore(openvino.Core):
        def compile_model(self, model, device, settings):
            seen.append(settings)
            return super().compile_model(model, device, settings)

    monkeypatch.setattr(openvino, "Core", RecordingCore)
    recommended = create_engine("openvino", float_model, threads=2, requests=0)
    assert recommended.requests >= 1 and recommended.settings["hint"] == "THROUGHPUT"
    assert "PERFORMANCE_HINT_NUM_REQUESTS" not in seen[-1] and "NUM_STREAMS" not in seen[-1]
    assert create_engine("openvino", float_model, threads=2, requests=1).streams == 1
    assert seen[-1]["NUM_STREAMS"] == 1 and "PERFORMANCE_HINT" not in seen[-1]
    # Parallel test processes have one core each, which OpenVINO does not divide.
    assert create_engine("openvino", float_model, threads=2, requests=2).streams == min(2, available_cpus())
    assert seen[-1]["PERFORMANCE_HINT_NUM_REQUESTS"] == 2 and seen[-1]["INFERENCE_NUM_THREADS"] == 2


@pytest.mark.parametrize(
    ("threads", "requests", "expected"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (4, 4, [1]), (2, 8, [1]), (3, 2, [2, 1]), (2, 0, [1])],
)
def test_sessions_of_onnx_runtime_share_the_threads(float_model, monkeypatch, threads, requests, expected) -> None:
    for package in ("onnxruntime", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from act_pipeline.engines.onnx_runtimes.onnxruntime import OnnxRuntimeEngine

    shares, load = [], OnnxRuntimeEngine._load

    def recording(self, summary, batch_size, share):
        shares.append(share)
        return load(self, summary, batch_size, share)

    monkeypatch.setattr(OnnxRuntimeEngine, "_load", recording)
    engine = create_engine("onnxruntime", float_model, threads=threads, requests=requests)
    assert shares == expected and engine.sessions == len(expected)
    assert engine.requests == (requests or threads)
    # A session without threads of its own computes in the caller's: as many callers at a time as threads.
    assert engine._free.qsize() == min(engine.requests, threads)


def test_an_engine_of_one_request_refuses_several(float_model) -> None:
    with pytest.raises(UserError, match="paddle runs one request at a time, expected one of openvino, onnxruntime"):
        create_engine("paddle", float_model, threads=1, requests=2)


# --- deploy/benchmark.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function that measures the throughput of sleeping engines."""
    monkeypatch.setattr(plan, "support", sleeping_support)
    monkeypatch.setattr(plan, "inspect_model", fake_summary)
    reader = TinyReader(make_tiny_data(tmp_path / "data"), tmp_path / "data" / "images")

    def run(kind: str = "", **flags):
        request = BenchmarkRequest(
            **{
                "model_path": str(fake_model(tmp_path / f"{kind}fp32", 400)),
                "int8_model_path": str(fake_model(tmp_path / f"{kind}int8", 100)),
                "throughput": True, "quick": True, "cpu_threads": 1, "device": "CPU", "burst_seconds": 0.1, **flags,
            }
        )  # fmt: skip
        return run_benchmark(request, say=lambda line: None, reader=reader, here=MACHINE, create=sleeping_engine)

    return run


@pytest.mark.alone  # it measures seconds
def test_every_load_of_every_engine_is_a_row(sleeping, tmp_path: Path) -> None:
    outcome = sleeping(
        engines=("openvino", "paddle_onednn"), batches=(4,), requests=(1, 0), json=str(tmp_path / "b.json"),
        chart=str(tmp_path / "b.png"),
    )  # fmt: skip
    rows = {(row.label, row.requests): row for row in outcome.record.throughput}
    # The engine decides what 0 is; those of one request at a time have no other row.
    several = {(label, requests) for label in ("openvino fp32", "openvino int8") for requests in (1, 3)}
    assert len(outcome.record.throughput) == len(rows)
    assert set(rows) == several | {("paddle_onednn fp32", 1), ("paddle_onednn int8", 1)}
    for (label, requests), row in rows.items():
        sleep_ms = {"openvino fp32": 8, "openvino int8": 4, "paddle_onednn fp32": 12, "paddle_onednn int8": 6}[label]
        expected = 1000 / sleep_ms * 4 * requests
        assert row.batch_size == 4 and 0.2 * expected < row.images_per_second <= expected
        assert sleep_ms <= row.latency_ms["p50"] <= row.latency_ms["p99"] and row.runs >= 3 * 3 * requests
        assert len(row.rates) == 3 and row.ratio_to_peer is None
        fp32 = rows[label.replace("int8", "fp32"), requests]
        speed_ups = [ours / theirs for ours, theirs in zip(row.rates, fp32.rates)]
        assert row.ratio_to_fp32.by_round == pytest.approx(np.median(speed_ups), rel=1e-3)
        assert row.ratio_to_fp32.to == fp32.label
    lines = "\n".join(outcome.lines)
    assert "most images/s: openvino int8" in lines and "at batch 4, 3 requests" in lines
    record = read_record(tmp_path / "b.json", BENCHMARK_SCHEMA)
    assert record["rows"] == [] and record["settings"]["burst_seconds"] == 0.1
    assert json.loads(json.dumps(outcome.record.as_json())) == json.loads(
        json.dumps(BenchmarkRecord.from_json(record).as_json())
    )
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_a_fixed_batch_is_the_only_one(sleeping) -> None:
    outcome = sleeping("fixed_", engines=("openvino",), precisions=("int8",), batches=(1, 4), requests=(1,))
    assert [row.batch_size for row in outcome.record.throughput] == [2]
    assert any("the model's batch is fixed: measured at 2 only" in line for line in outcome.lines)


def test_an_engine_that_fails_is_a_row_with_its_reason_and_all_failing_an_error(sleeping, monkeypatch) -> None:
    monkeypatch.setenv(FAIL_VARIABLE, "openvino_int8:run")
    flags = {"engines": ("openvino",), "batches": (1,), "requests": (2,)}
    outcome = sleeping(**flags)
    assert [(row.label, row.failure) for row in outcome.record.throughput] == [
        ("openvino fp32", None), ("openvino int8", "ZeroDivisionError: no more"),
    ]  # fmt: skip
    assert "failed: openvino int8 (batch 1, 2 requests): ZeroDivisionError: no more" in outcome.lines
    with pytest.raises(UserError, match="no engine could run: openvino int8: ZeroDivisionError"):
        sleeping(**flags, precisions=("int8",))


def test_requests_for_a_number_of_threads() -> None:
    assert default_requests(1) == (1, 2) and default_requests(2) == (1, 2, 4)
    assert default_requests(16) == (1, 4, 8, 16, 32)


def test_flags_make_a_request() -> None:
    request = parse_request(["--throughput", "--batches", "1,8", "--requests", "1,Auto,4", "--burst_seconds", "0.5"])
    assert (request.batches, request.requests, request.burst_seconds) == ((1, 8), (1, 4, 0), 0.5)
    assert request.rounds == 10 and not request.evaluated
    assert parse_request(["--throughput", "--requests=auto"]).requests == (0,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batches", "1"], "--batches is for --throughput, which is not given"),
        (["--throughput", "--batches", "0,1"], "found '0,1', expected whole numbers of at least 1"),
        (["--throughput", "--requests", "many"], "found 'many', expected whole numbers"),
        (["--throughput", "--batch_size", "4"], "--batch_size=4 is for latencies, --throughput takes --batches=4"),
        (["--throughput", "--repeats", "4"], "--repeats=4 is too few for a figure to rely on, expected at least 10"),
        (["--throughput", "--burst_seconds", "-1"], "found '-1', expected a number of seconds above 0"),
    ],
)
def test_flags_say_what_is_wrong(argv, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_request(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- deploy/infer_eval.py --hint=throughput --------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [False, True])
def test_the_hint_is_taken_by_the_fastest_engine(float_model, tmp_path: Path, monkeypatch, benchmark: bool) -> None:
    for package in ("openvino", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from act_pipeline.inference import timing

    monkeypatch.setattr(timing, "THROUGHPUT_SECONDS", 0.2)
    reader = TinyReader(make_tiny_data(tmp_path / "data", images=5), tmp_path / "data" / "images")
    request = InferenceRequest(
        str(float_model.directory), engine="auto", device="CPU", cpu_threads=2, hint="throughput", batch_size=2,
        benchmark=benchmark,
    )  # fmt: skip
    outcome = run_inference(request, reader=reader, say=lambda line: None)
    record = outcome.record
    settings = record["engine_settings"]
    assert settings["hint"] == "THROUGHPUT" and record.get("requests", 1) == int(settings["requests"])
    assert record["images_per_second"] > 0
    several = available_cpus() > 1  # parallel test processes have one core each
    assert ("requests" in record) == several
    if not several:
        return
    if benchmark:
        assert record["latency_ms"]["p99"] > 0 and "in parallel" in outcome.lines[-1]
    else:
        assert record["map"] == 1.0 and record["images"] == 5 and record["latency_ms"] is None
        assert "images/s with" in outcome.lines[-1]


def test_the_hint_says_where_it_has_no_effect(float_model, tmp_path: Path) -> None:
    reader = TinyReader(make_tiny_data(tmp_path / "data"), tmp_path / "data" / "images")
    said: list[str] = []
    request = InferenceRequest(
        str(float_model.directory), engine="paddle", device="CPU", cpu_threads=1, hint="throughput"
    )
    outcome = run_inference(request, reader=reader, say=said.append)
    assert any("--hint=throughput has no effect: paddle runs one request at a time" in line for line in said)
    assert outcome.record["latency_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engine": "all"}, "--hint=throughput is for one engine, --engine is all"),
        ({"image_file": "a.jpg"}, "--hint=throughput contradicts --image_file"),
        ({"shards": 2}, "--hint=throughput contradicts --shards"),
    ],
)
def test_the_hint_contradicts_other_flags(float_model, flags, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_inference(InferenceRequest(str(float_model.directory), hint="throughput", **flags), say=lambda line: None)
