"""Shares of activations beyond their calibrated ranges: the probe, its figures, the rule, and the sample's pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from inference_fixtures import TRAINED
from serving_fixtures import Scene, audit_of, make_model

from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import RANGES_FILENAME, RANGES_SCHEMA, write_record
from act_pipeline.demo import COMPRESS_CONFIG
from act_pipeline.engines.onnx_runtimes.range_probe import RangeProbe, probe_runtime, write_model_probe
from act_pipeline.evaluation.detections_file import CALIBRATION_FILENAME, load_detections
from act_pipeline.onnx_export.range_probe import write_range_probe
from act_pipeline.server.float_models import FloatModels
from act_pipeline.server.items import Picture
from act_pipeline.server.settings import Limits
from act_pipeline.serving import Monitor, RangeShares, Repository, Temperature, load_rules, promote
from act_pipeline.serving.baseline import recorded_baseline
from act_pipeline.serving.ranges import range_figures, read_ranges
from act_pipeline.serving.shadow import Shadow

RUNTIMES = ("onnxruntime", "openvino")


# --- the probe -------------------------------------------------------------------------------------------------------


def quantized_file(path: Path) -> Path:
    """Write x -> Q/DQ (uint8) -> + 1 -> Q/DQ (int8), twice: they read the clipped values."""
    import onnx
    from onnx import TensorProto, helper

    def constant(name: str, value) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    constants: list = []
    first = [constant("s", np.float32(0.1)), constant("z", np.uint8(100))]
    second = [constant("s2", np.float32(0.1)), constant("z2", np.int8(0))]
    weight = [constant("w", np.int8([[3]])), constant("ws", np.float32(0.5)), constant("wz", np.int8(0))]
    nodes = [
        helper.make_node("QuantizeLinear", ["image", *first], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *first], ["dq"]),
        helper.make_node("Add", ["dq", constant("one", np.float32(1))], ["sum/12"]),
        helper.make_node("QuantizeLinear", ["sum/12", *second], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", *second], ["dq2"]),
        helper.make_node("DequantizeLinear", weight, ["wdq"]),
        helper.make_node("QuantizeLinear", ["sum/12", *first], ["q3"]),
        helper.make_node("DequantizeLinear", ["q3", *first], ["dq3"]),
        helper.make_node("Mul", ["dq2", "wdq"], ["scaled"]),
        helper.make_node("Add", ["dq3", "scaled"], ["last"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 4, 4])
    last = helper.make_tensor_value_info("last", TensorProto.FLOAT, ["N", 1, 4, 4])
    graph = helper.make_graph(nodes, "g", [image], [last], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_probe_counts_what_rounding_clips(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    tensors = write_range_probe(quantized_file(tmp_path / "m.onnx"), tmp_path / "p.onnx")
    assert tensors == ("image", "sum", "sum#2")
    probe = RangeProbe(tmp_path / "p.onnx", runtime, 1)
    values = np.linspace(-12, 17, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    values[0, 0, 0, :3] = [-10.04, 15.54, 15.56]  # less than half a step of 0.1 beyond -10 .. 15.5, and more
    rounded = np.clip(np.rint(values / 0.1), -100, 155) * 0.1 + 1
    beyond = [(values < -10.05) | (values > 15.55), (rounded < -12.85) | (rounded > 12.75), rounded > 15.55]
    wanted = [found.mean() for found in beyond]
    assert wanted == [2 / 16, 5 / 16, 4 / 16]
    np.testing.assert_allclose(probe.run({"image": values, "im_shape": np.zeros((1, 2))}), wanted, atol=1e-6)
    np.testing.assert_allclose(probe.run({"image": values * 0}), [0, 0, 0], atol=1e-6)
    with pytest.raises(UserError, match="needs the input image"):
        probe.run({})


def test_a_float_file_has_no_ranges(tmp_path: Path, float_model: InferenceModel) -> None:
    with pytest.raises(UserError, match="rounds no activation with a constant scale, expected an INT8 model"):
        write_model_probe(float_model)


# --- figures and the rule --------------------------------------------------------------------------------------------

USUAL = {"conv": 0.002, "relu": 0.0}


class Service:
    """One version, whose activations are as a function of the request says; every fifth request is shadowed."""

    def __init__(self, root: Path, ranges: dict[str, float] | None = None, **options) -> None:
        model = make_model(root / "a")
        if ranges is not None:
            write_record(model / RANGES_FILENAME, RANGES_SCHEMA, {"images": 8, "shares": ranges})
        self.repository = Repository.open(root / "repository", create=True)
        promote(self.repository, model)
        self.now, self.tell = 0.0, options.pop("tell")
        rules = load_rules(overrides=["shadow.share=20", *options.pop("rules", [])])
        self.monitor = Monitor(
            self.repository, rules, None, lambda: Temperature(50.0, "a test"), lambda: self.now, range_probe=self.probe
        )

    def probe(self, number: int) -> RangeShares | str:
        found = self.tell(number)
        return found if isinstance(found, str) else RangeShares(("conv", "relu"), np.array(found), "onnxruntime")

    def serve(self, requests: int) -> dict:
        scene = Scene()
        for number in range(requests):
            self.now += 0.1
            self.monitor.answered(1, f"r{number}", scene.int8_detections(number), 0.03, number)
            self.monitor.drain_shadow()
        return self.monitor.figures()["versions"]["1"]

    def alarms(self) -> list[dict]:
        return [entry for entry in audit_of(self.repository.folder) if entry.get("metric") == "beyond_range"]


def noisy(number: int, factor: float = 1.0) -> list[float]:
    random = np.random.default_rng(number)
    return [factor * 0.002 * random.uniform(0.5, 1.5), factor * 0.00002 * random.uniform(0, 1)]


def test_more_activations_beyond_their_ranges_raise_an_alarm(tmp_path: Path) -> None:
    service = Service(tmp_path, USUAL, tell=noisy)
    window = service.serve(400)["window"]
    assert window["ranged"] == 50 and window["beyond_range"] == pytest.approx(1.05, abs=0.1) and not service.alarms()
    assert window["beyond_range_source"] == "onnxruntime" and window["beyond_range_tensor"] in USUAL
    service.tell = lambda number: [0.002, 0.02]
    version = service.serve(300)
    (alarm,) = service.alarms()
    assert alarm["event"] == "alarm" and alarm["value"] > 1.25 and service.repository.state().live == 1
    assert alarm["figures"]["beyond_range_tensor"] == "relu"
    assert version["window"]["beyond_range_tensor_baseline"] == 0.0
    text = service.monitor.prometheus()
    assert 'act_pipeline_beyond_range{version="1"}' in text
    assert 'act_pipeline_beyond_range_worst{version="1",tensor="relu"}' in text
    assert version["counters"]["shadowed"] == version["counters"]["shadow_errors"] == 0  # there is no float model
    service.monitor.close()


def test_where_nothing_tells_the_figure_says_so(tmp_path: Path) -> None:
    service = Service(tmp_path, USUAL, tell=lambda number: "neither ONNX Runtime nor OpenVINO is here")
    version = service.serve(100)
    window = version["window"]
    assert window["beyond_range"] is None and window["ranged"] == 0 and version["counters"]["shadow_errors"] == 0
    assert window["beyond_range_source"] == "not available here: neither ONNX Runtime nor OpenVINO is here"
    assert "act_pipeline_beyond_range" not in service.monitor.prometheus()
    json.dumps(window, allow_nan=False)
    service.monitor.close()


def test_without_a_baseline_there_is_a_share_and_no_ratio(tmp_path: Path) -> None:
    service = Service(tmp_path, tell=lambda number: [0.5, 0.1])
    window = service.serve(200)["window"]
    assert window["beyond_range"] is None and window["beyond_range_share"] == pytest.approx(0.3)
    assert not service.alarms()
    service.monitor.close()
    off = Service(tmp_path / "off", USUAL, tell=noisy, rules=["shadow.ranges=false", "rules=[]"])
    assert off.serve(50)["window"]["ranged"] == 0
    off.monitor.close()


def test_a_tensor_that_the_baseline_lacks_is_left_out_of_the_ratio() -> None:
    seen = [RangeShares(("a", "b", "new"), np.array([0.0019, 0.0009, 0.9]), "a test")]
    found = range_figures(seen, {"a": 0.0009, "b": 0.0009}, None)
    assert found["beyond_range"] == pytest.approx(1.5) and found["beyond_range_tensor"] == "a"
    assert range_figures(seen, {"a": 0.0009}, None)["beyond_range"] is None  # most of them are unknown


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is beyond_range, which needs shadow\.ranges: true"):
        load_rules(overrides=["shadow.ranges=false"])
    write_record(tmp_path / RANGES_FILENAME, RANGES_SCHEMA, {"shares": {"x": 2}})
    with pytest.raises(UserError, match=r"ranges\.json: the shares of activations .* are damaged; compress again"):
        read_ranges(tmp_path / RANGES_FILENAME)
    assert read_ranges(tmp_path / "none.json") == {}


# --- the sample ------------------------------------------------------------------------------------------------------


def test_a_compression_keeps_what_is_usual_on_its_calibration_images(demo) -> None:
    model = demo.compressed.model
    asked = load_config(COMPRESS_CONFIG, TRAINED).quant_post.images
    kept = load_detections(model.directory / CALIBRATION_FILENAME)
    assert len(kept.image_ids) == min(asked, 64) and len(kept.rows["int8"])
    found = recorded_baseline(model)
    assert found is not None and found.source == "calibration" and found.images == len(kept.image_ids)
    assert found.detections > 1 and found.classes and found.disagreement is not None
    shares = read_ranges(model.directory / RANGES_FILENAME)
    assert len(shares) > 50 and 0 < np.mean(list(shares.values())) < 0.01


def test_without_calibration_images_the_evaluation_s_are_usual(demo, tmp_path: Path) -> None:
    source, copy = demo.compressed.model, tmp_path / "copy"
    copy.mkdir()
    for name in ("model.pdmodel", "model.pdiparams", "detections.npz"):
        (copy / name).symlink_to(source.directory / name)
    found = recorded_baseline(InferenceModel.load(copy))
    assert found is not None and found.source == "evaluation" and not found.classes
    (copy / CALIBRATION_FILENAME).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"calibration\.npz holds no detections"):
        recorded_baseline(InferenceModel.load(copy))


def changed(picture: np.ndarray, kind: str) -> np.ndarray:
    if kind == "dark":
        return (picture * 0.1).astype(np.uint8)
    if kind == "contrast":
        return np.clip((picture.astype(float) - 128) * 4 + 128, 0, 255).astype(np.uint8)
    return picture


def test_pictures_that_drift_are_beyond_the_ranges_of_the_sample(demo, tmp_path: Path) -> None:
    runtime = probe_runtime()
    if runtime is None:
        pytest.skip("neither ONNX Runtime nor OpenVINO is here")
    model, reader = demo.compressed.model, demo.reader()
    path, tensors = write_model_probe(model)
    probe, found = RangeProbe(path, runtime, 1), {}
    files = [Path(record.file) for record in reader.dataset("eval").records[:16]]
    for kind in ("usual", "dark", "contrast"):
        for number, file in enumerate(files):
            cv2.imwrite(str(tmp_path / "x.png"), changed(cv2.imread(str(file)), kind))
            found[kind, number] = probe.run(reader.preprocess(tmp_path / "x.png"))
    for kind in ("usual", "dark", "contrast"):
        after, ratio, tensor = drifting(tmp_path / kind, model, tensors, found, kind, len(files))
        print(f"{kind}: alarm after {after} requests, {ratio:.2f} times the calibration's share, {tensor}")
        if kind == "usual":
            assert after is None and 0.7 < ratio < 1.25
        else:
            assert after is not None and after <= 300 and ratio > 1.4


def drifting(folder: Path, model: InferenceModel, tensors, found, kind: str, files: int):
    """Serve 300 requests of usual pictures, then others until an alarm; return after how many of them it came."""
    repository, which = Repository.open(folder, create=True), ["usual"]
    promote(repository, model.directory, force=True)
    monitor = Monitor(
        repository, load_rules(overrides=["shadow.share=20"]), None, lambda: Temperature(50.0, "a test"),
        range_probe=lambda number: RangeShares(tensors, found[which[0], number % files], "a test"),
    )  # fmt: skip
    after = None
    for number in range(700):
        which[0] = "usual" if number < 300 else kind
        monitor.answered(1, f"r{number}", np.zeros((0, 6)), 0.03, number)
        monitor.drain_shadow()
        if any(entry.get("metric") == "beyond_range" for entry in audit_of(repository.folder)):
            after = number + 1 - 300
            break
    window = monitor.figures()["versions"]["1"]["window"]
    monitor.close()
    return after, window["beyond_range"], window["beyond_range_tensor"]


@pytest.mark.slow
def test_the_process_of_low_priority_runs_the_probe(demo, tmp_path: Path) -> None:
    repository = Repository.open(tmp_path / "repository", create=True)
    version, _ = promote(repository, demo.compressed.model.directory, force=True)
    floats = FloatModels(repository, 1, Limits())
    try:
        file = demo.reader().dataset("eval").records[0].file
        found = floats.ranges(1, Picture(Path(file).read_bytes()))
        assert isinstance(found, RangeShares), found
        assert set(found.tensors) == set(version.ranges) and found.shares.shape == (len(found.tensors),)
        assert 0.2 < found.shares.mean() / np.mean(list(version.ranges.values())) < 5
        with pytest.raises(UserError, match="are no JPEG or PNG"):
            floats.ranges(1, Picture(b"nonsense"))
        assert isinstance(floats.ranges(2, Picture(b"")), str)  # there is no such version
    finally:
        floats.close()


@pytest.mark.parametrize(("seconds", "probed"), [(0.2, 1), (0.0, 5)])
def test_slow_probes_are_few(seconds: float, probed: int) -> None:
    """A probe that takes long pauses; the requests meanwhile run in the float model only."""
    seen: list[int] = []
    floats: list[int] = []

    def probe(inputs: int) -> RangeShares:
        time.sleep(seconds)
        seen.append(inputs)
        return RangeShares(("x",), np.zeros(1, np.float32), "test")

    def run(inputs: int) -> np.ndarray:
        floats.append(inputs)
        return np.zeros((0, 6))

    shadow = Shadow(run, lambda *_: None, lambda _: None, probe=probe, probe_time=0.05)
    for number in range(5):
        assert shadow.offer(1, number, np.zeros((0, 6)))
    shadow.drain()
    shadow.close()
    assert len(seen) == probed and floats == list(range(5))
