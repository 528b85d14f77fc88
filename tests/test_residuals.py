"""Residual connections of rounded maps: which ops read them, what they compute, and when `auto` takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import paddle
import pytest

from act_pipeline.compress import calibrating
from act_pipeline.compress.accuracy_control.residuals import round_residuals
from act_pipeline.compress.calibrating import Compared, FloatModel, best
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.result.candidate_details import residuals_line
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.demo import READER_CONFIG
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower
from act_pipeline.onnx_export.targets import TARGETS

CONFIG = """
Global: {{reader_config: {reader}, model_dir: {model}, Evaluation: false}}
Strategy: {{name: ptq}}
QuantPost: {{calib_images: 8, algo: abs_max}}
"""
IMAGES = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)


def blocks(image: Any) -> Any:
    """Three blocks of a ResNet-vd: a plain one, one with a pooled connection, and one whose map others read too."""
    conv, relu = paddle.static.nn.conv2d, paddle.nn.functional.relu
    a = relu(conv(image, 8, 3, padding=1))
    b = relu(conv(relu(conv(a, 8, 3, padding=1)), 8, 3, padding=1) + a)
    inner = conv(relu(conv(b, 8, 3, stride=2, padding=1)), 8, 3, padding=1)
    c = relu(inner + conv(paddle.nn.functional.avg_pool2d(b, 2), 8, 1))
    d = conv(c, 8, 3, padding=1) + c
    return d + c.mean([1], keepdim=True)


def projected(image: Any) -> Any:
    """The first block of a stage, whose connection has a convolution, and one whose sum is read in float too."""
    conv, relu = paddle.static.nn.conv2d, paddle.nn.functional.relu
    a = relu(conv(image, 8, 3, padding=1))
    b = relu(conv(a, 8, 3, padding=1) + conv(a, 8, 1))
    c = conv(b, 8, 3, padding=1) + conv(b, 8, 1)
    return conv(c, 8, 3, padding=1) * c


def without(image: Any) -> Any:
    return paddle.static.nn.conv2d(paddle.static.nn.conv2d(image, 8, 3), 8, 3).mean([2, 3])


def saved(build: Any, folder: Path) -> InferenceModel:
    main, startup = paddle.static.Program(), paddle.static.Program()
    main.random_seed = startup.random_seed = 1
    with paddle.static.scope_guard(paddle.static.Scope()), paddle.static.program_guard(main, startup):
        with paddle.utils.unique_name.guard():
            image = paddle.static.data("image", [-1, 3, 16, 16], "float32")
            output = build(image)
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            paddle.static.save_inference_model(str(folder / "model"), [image], [output], executor, program=main)
    return InferenceModel.load(folder)


def calibrated(build: Any, folder: Path) -> InferenceModel:
    for name in ("float", "int8", "rounded"):
        (folder / name).mkdir()
    model, config = saved(build, folder / "float"), folder / "c.yml"
    config.write_text(CONFIG.format(reader=READER_CONFIG, model=model.directory))
    batches: Iterator[dict[str, np.ndarray]] = iter([{"image": IMAGES}])
    return PostTraining(model, load_config(config), lambda: batches).write(folder / "int8").model


def run(model: InferenceModel, tensor: str = "") -> np.ndarray:
    graph = StaticGraph.load(model)
    with paddle.static.scope_guard(graph.scope):
        name = tensor or graph.fetch_targets[0].name
        found = graph.executor.run(graph.program, {"image": IMAGES}, [name])[0]
    graph.close()
    return np.asarray(found)


def assert_every_target_computes(model: InferenceModel, expected: np.ndarray, folder: Path) -> None:
    """Compare the ONNX file of every target with Paddle, also where activations are divided by their scales."""
    for target in TARGETS:
        lower(model, folder / f"{target}.onnx", target)
        session = onnxruntime.InferenceSession(str(folder / f"{target}.onnx"), providers=["CPUExecutionProvider"])
        found = session.run(None, {"image": IMAGES})[0]
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max(), target


def test_additions_and_poolings_read_what_the_convolution_reads(tmp_path: Path) -> None:
    with static_mode():
        int8 = calibrated(blocks, tmp_path)
        rounded, names = round_residuals(int8, tmp_path / "rounded")
        graph = StaticGraph.load(rounded)
        index = GraphIndex(graph.program.global_block().ops)
        changed = [index.producer[name] for name in names]
        assert sorted(op.type for op in changed) == ["elementwise_add", "pool2d"]
        for op in changed:
            sources = [index.producer[name] for name in op.input_arg_names]
            read = [source for source in sources if source.type == "dequantize_linear"]
            assert len(read) == 1
            before = index.producer[read[0].input("X")[0]].input("X")[0]
            assert [reader.type for reader in index.readers[before]] == ["quantize_linear"]
        graph.close()
        exact, found = run(int8), run(rounded)
        difference = np.abs(found - exact).max()
        assert 0 < difference < 0.05 * np.abs(exact).max()
        assert round_residuals(rounded, tmp_path / "rounded")[1] == []
    lower(rounded, tmp_path / "rounded.onnx", "cpu")
    path = str(tmp_path / "rounded.onnx")
    nodes = onnx.load(path).graph.node
    writers = {name: node.op_type for node in nodes for name in node.output}
    reading = [node.op_type for node in nodes if "DequantizeLinear" in [writers.get(name) for name in node.input]]
    assert reading.count("Add") == 1 and reading.count("AveragePool") == 1
    assert_every_target_computes(rounded, found, tmp_path)


def test_the_map_of_a_connection_with_a_convolution_is_rounded(tmp_path: Path) -> None:
    with static_mode():
        int8 = calibrated(projected, tmp_path)
        rounded, (name,) = round_residuals(int8, tmp_path / "rounded")
        graph = StaticGraph.load(rounded)
        index = GraphIndex(graph.program.global_block().ops)
        addition = index.producer[name]
        assert index.readers[name][0].type == "relu"
        other, dequantize = (index.producer[read] for read in addition.input_arg_names)
        assert (other.type, dequantize.type) == ("elementwise_add", "dequantize_linear")
        quantize = index.producer[dequantize.input("X")[0]]
        bias = index.producer[quantize.input("X")[0]]
        weight = index.producer[bias.input("X")[0]].input("Filter")[0]
        assert tuple(graph.program.global_block().var(weight).shape) == (8, 8, 1, 1)
        threshold = float(graph.parameter(quantize.input("Scale")[0])[0])
        graph.close()
        assert np.isclose(threshold, np.abs(run(int8, quantize.input("X")[0])).max(), rtol=0.1)  # algo: abs_max
        exact, found = run(int8), run(rounded)
        assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert_every_target_computes(rounded, found, tmp_path)


def test_ptq_rounds_residual_connections_if_the_config_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Candidate("ptq:mse", "ptq", "float", None, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(calibrating, "_calibrate", lambda *given: SimpleNamespace(seconds={}))
    monkeypatch.setattr(calibrating, "_made", lambda *given: made)
    monkeypatch.setattr(calibrating, "round_residuals", lambda *given: ("rounded", ["a"]))
    nothing: Any = None
    for value, expected in ((False, "float"), (True, "rounded")):
        job: Any = SimpleNamespace(
            config=SimpleNamespace(quant_post=SimpleNamespace(algo="mse", round_residuals=value)),
            tried=SimpleNamespace(add=lambda candidate: candidate),
            folder=lambda name: tmp_path,
        )
        assert calibrating.calibrated(job, FloatModel("ptq", nothing, nothing)).model == expected


def test_a_model_without_residual_connections_is_left_as_it_is(tmp_path: Path) -> None:
    with static_mode():
        int8 = calibrated(without, tmp_path)
        assert round_residuals(int8, tmp_path / "rounded") == (int8, [])
    assert not list((tmp_path / "rounded").iterdir())


@pytest.mark.parametrize(
    ("change", "meets", "chosen", "evaluated"),
    [
        (0.114, "rounded", "rounded", ["rounded"]),
        (0.114, "float", "float", ["rounded", "float"]),
        (0.116, "float", "float", ["float"]),
        (None, "float", "float", ["float"]),
    ],
)
def test_auto_rounds_them_where_the_detections_hardly_change(
    change: float | None, meets: str, chosen: str, evaluated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    added: list[Any] = []

    def add(candidate: Candidate) -> Candidate:
        added.append(candidate.model)
        return candidate

    tried = SimpleNamespace(add=add, meets=lambda candidate: candidate.model == meets, rank=lambda candidate: 0)
    held_out = SimpleNamespace(change=lambda model: change, feeds=[{}] * 32)
    job: Any = SimpleNamespace(tried=tried, held_out=held_out, say=lines.append, folder=lambda name: tmp_path)
    nothing: Any = None
    made = Candidate("ptq:mse", "ptq", "float", nothing, nothing, nothing, seconds={"calibrate": 1.0})  # type: ignore[arg-type]
    monkeypatch.setattr(calibrating, "_made", lambda *given: made)
    monkeypatch.setattr(
        calibrating, "round_residuals", lambda *given: ("rounded", [] if change is None else ["a", "b"])
    )
    monkeypatch.setattr(calibrating, "take_back", lambda job, candidate, *given: candidate)
    found = best(job, Compared(FloatModel("ptq", nothing, nothing), nothing, {"mse": 0.1}, {}), 0.1)
    assert found.model == chosen and added == evaluated
    assert len(lines) == (change is not None)
    details = found.details.residuals
    if change is None or (chosen == "float" and change <= 0.115):
        assert details is None
    else:
        assert details is not None and details.rounded is (chosen == "rounded")
        assert residuals_line(details.as_json()) == lines[0]
        assert lines[0].endswith(": rounded" if details.rounded else ": stay float")
    assert found.seconds.get("calibrate", 0.0) == (1.0 if len(evaluated) == 1 else 0.0)
