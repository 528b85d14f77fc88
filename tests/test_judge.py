"""The evaluation engine is the one in which this machine deploys INT8."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.compress.accuracy_control.revert import read_thresholds, rescaled
from act_pipeline.compress.judging.choice import choose_judge
from act_pipeline.compress.judging.judge import REFERENCE, Judge
from act_pipeline.compress.judging.tensorrt_shapes import collect_shapes
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import fastest_engine, machine
from act_pipeline.engines.onnx_runtimes import openvino
from act_pipeline.engines.paddle.dynamic_shape import ShapeKey, stale_reason
from act_pipeline.evaluation.batches import measure_in_turns
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.inference import InferenceRequest, run_inference


def test_auto_is_what_infer_eval_takes(demo) -> None:
    judge = choose_judge("auto", "CPU", demo.fp32)
    assert (judge.engine, judge.device) == fastest_engine("int8", "CPU")[:2] == ("openvino", "CPU")
    assert judge.fp32_engine == "openvino" and judge.why and not judge.is_reference
    assert judge.parallel[0] == 1


def test_a_model_that_the_engine_does_not_take_is_judged_by_the_reference(
    demo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args, **options):
        raise UserError("op erf has no rule")

    monkeypatch.setattr("act_pipeline.onnx_export.lowered_onnx", refuse)
    judge = choose_judge("auto", "CPU", demo.fp32)
    assert judge.is_reference and judge.fp32_engine == "paddle_onednn"
    assert "op erf has no rule" in caplog.text
    assert choose_judge("openvino", "CPU", demo.fp32).engine == "openvino", "a name is taken at its word"


@pytest.mark.parametrize("supported", [True, False])
def test_candidates_compute_in_bf16_what_is_not_int8_where_the_float_model_says_so(
    demo, supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folders have no infer_cfg.yml; the result is what `infer_eval` finds with the written model."""
    monkeypatch.setattr(openvino, "computes_in_bf16", lambda core: supported)
    shutil.copytree(demo.fp32.directory, tmp_path / "float")
    with open(tmp_path / "float" / "infer_cfg.yml", "a", encoding="utf-8") as file:
        file.write("float_precision: bf16\n")
    (tmp_path / "candidate").mkdir()
    for name in ("model.pdmodel", "model.pdiparams"):
        shutil.copyfile(demo.compressed.model.directory / name, tmp_path / "candidate" / name)
    candidate = InferenceModel.load(tmp_path / "candidate")
    for folder, expected in ((tmp_path / "float", "bf16" if supported else "f32"), (demo.fp32.directory, "f32")):
        judge = choose_judge("openvino", "CPU", InferenceModel.load(folder))
        assert ("the rest bf16, as infer_cfg.yml says" in judge.why) == (expected == "bf16") == judge.rest_in_bf16
        with contextlib.closing(judge.load(candidate, "int8", demo.reader(), 1)) as engine:
            assert engine.float_precision == expected
        with contextlib.closing(judge.load(demo.fp32, "fp32", demo.reader(), 1)) as engine:
            assert engine.float_precision == "f32"


@pytest.mark.parametrize(("asked", "words"), [("paddle_trt", "paddle_trt int8 on GPU cannot run here")])
def test_an_engine_that_is_not_here_is_one_line(demo, asked: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        choose_judge(asked, "CPU", demo.fp32)
    assert "\n" not in str(raised.value)


def test_the_reference_runs_an_engine_a_core() -> None:
    count, threads = Judge(REFERENCE, "paddle_onednn", "CPU", "").parallel
    assert count * threads <= max(len(machine().packages), 64) and count >= 1 and threads >= 1
    assert Judge("tensorrt", "tensorrt", "GPU", "").parallel[0] == 1


@pytest.mark.parametrize(
    ("engine", "device", "expected"),
    [
        ("openvino", "CPU", True),
        ("onnxruntime", "CPU", True),
        ("onnxruntime", "GPU", False),
        ("tensorrt", "GPU", False),
        (REFERENCE, "CPU", False),
        ("paddle_onednn", "CPU", False),
    ],
)
def test_the_engines_with_zero_points(engine: str, device: str, expected: bool) -> None:
    assert Judge(engine, engine, device, "").has_zero_points is expected


class Sleeping:
    def __init__(self, seconds: float, runs: list[str], name: str) -> None:
        self.seconds, self.runs, self.name = seconds, runs, name

    def run(self, inputs):
        self.runs.append(self.name)
        time.sleep(self.seconds)


@pytest.mark.alone
def test_latencies_are_taken_in_turns() -> None:
    runs: list[str] = []
    engines = {"fp32": Sleeping(0.02, runs, "f"), "int8": Sleeping(0.005, runs, "i")}
    found = measure_in_turns(engines, [{}], rounds=5, warmup=1)
    assert runs == ["f", "i"] * 6
    assert found["fp32"].ratio == 1 and 2 < found["int8"].ratio < 5
    assert 4 < found["int8"].latency_ms["p50"] <= found["int8"].latency_ms["p90"] < 20


def test_an_int8_model_gets_other_scales_and_nothing_else(demo, tmp_path: Path) -> None:
    with static_mode():
        before = read_thresholds(demo.compressed.model)
        names = list(before)[:3]
        after = read_thresholds(rescaled(demo.compressed.model, {names[0]: 2.5, names[1]: 0.0}, tmp_path))
    assert after == {**before, names[0]: 2.5, names[1]: 1.0}
    assert (tmp_path / "model.pdmodel").read_bytes() == demo.compressed.model.model_path.read_bytes()


def test_shapes_for_tensorrt_are_collected_in_a_process_of_their_own(demo, tmp_path: Path) -> None:
    import shutil

    from act_pipeline.core.artifacts import InferenceModel

    shutil.copytree(demo.compressed.model.directory, tmp_path / "int8")
    model, reader = InferenceModel.load(tmp_path / "int8"), demo.reader()
    collect_shapes(model, reader, "CPU")
    height, width = reader.input_size
    assert stale_reason(model, ShapeKey(model.content_hash(), (height, width), 1, str(machine().paddle))) is None


def test_detections_are_rows_of_coco(demo) -> None:
    reader = demo.reader()
    feeds = [batch for _, batch in zip(range(2), reader.loader("train", batch_size=1, shuffle=False))]
    found = choose_judge("auto", "CPU", demo.fp32).detect(demo.fp32, "fp32", reader, feeds).rows
    assert found.shape[1] == 7 and set(found[:, 0]) == {0.0, 1.0} and np.isfinite(found).all()
    assert (found[:, 3:5] >= 0).mean() > 0.99 and ((found[:, 5] >= 0) & (found[:, 5] <= 1)).all()
    assert set(found[:, 6]) <= set(range(10))


def test_infer_eval_shows_every_engine(demo) -> None:
    said: list[str] = []
    request = InferenceRequest(str(demo.compressed.model.directory), engine="all", limit=6)
    outcome = run_inference(request, say=said.append, reader=demo.reader())
    rows = {(row["engine"], row["precision"]): row for row in outcome.record["rows"]}
    assert {("openvino", "fp32"), ("openvino", "int8"), ("int8_reference", "int8"), ("paddle", "fp32")} <= set(rows)
    assert all(0 <= row["map"] <= 1 and row["latency_ms"]["p50"] > 0 for row in rows.values() if not row["failure"])
    table = "\n".join(outcome.lines)
    assert "openvino" in table and "int8_reference" in table
    with pytest.raises(UserError, match="--use_trt is for one engine, --engine is all"):
        run_inference(InferenceRequest(engine="all", use_trt=True), reader=demo.reader())
