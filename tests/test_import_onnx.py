"""ONNX files into Paddle models: every rule against ONNX Runtime, files that are refused, and real detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_op_cases import CASES, REFUSED, Case, Feed

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers.onnx import read
from act_pipeline.importers.onnx.convert import convert
from act_pipeline.importers.onnx.rules.registry import RULES

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODELS = SHARED / "models"
CLOSE = 2e-5
X = Feed((1, 3, 5, 6))


def proto(case: Case, batch: Any = 1) -> onnx.ModelProto:
    """Return the model of one node; inputs are x0, x1, ..., outputs y0, y1, ..."""
    names, inputs, constants = [], [], []
    for index, each in enumerate(case.inputs):
        names.append("" if each is None else f"x{index}")
        if isinstance(each, Feed):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype))
            shape = [batch, *each.shape[1:]] if each.shape[:1] == (1,) else each.shape
            inputs.append(helper.make_tensor_value_info(names[-1], kind, shape))
        elif each is not None:
            constants.append(numpy_helper.from_array(np.asarray(each), names[-1]))
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the_node", **case.attrs)
    return model_of([node], inputs, [onnx.ValueInfoProto(name=name) for name in outputs], constants, case.opset)


def model_of(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any], opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def in_onnxruntime(path: Path, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, sample)


def in_paddle(model: InferenceModel, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    import paddle

    with static_mode():
        graph = StaticGraph.load(model)
        feed = {name: sample[name] for name in graph.feed_names}
        with paddle.static.scope_guard(graph.scope):
            found = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
        graph.close()
    return [np.asarray(each) for each in found]


def ops_of(model: InferenceModel) -> list[str]:
    with static_mode():
        graph = StaticGraph.load(model)
        found = [op.type for op in graph.program.global_block().ops]
        graph.close()
    return found


@pytest.fixture()
def unsimplified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep onnxslim from replacing the op that is tested."""
    monkeypatch.setattr(read, "_simplified", lambda model, *rest: model)


def run_converted(path: Path, samples: list[dict[str, np.ndarray]], batch: bool = False) -> list[Any]:
    """Convert without saving and run: each sample alone, or all as one batch; returns shapes too for a batch."""
    import paddle

    with static_mode():
        source = read.read_onnx(path)
        made = convert(source)
        if batch:
            made = convert(source, made.shapes)
            samples = [{name: np.concatenate([each[name] for each in samples]) for name in samples[0]}]
        graph, found = made.graph, []
        with paddle.static.scope_guard(graph.scope):
            for sample in samples:
                feed = {known: sample[name] for name, known in made.inputs.items()}
                found.append(graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets))
        shapes = [tuple(target.shape) for target in graph.fetch_targets]
    return [found[0], shapes] if batch else found


@pytest.mark.parametrize("name", CASES)
def test_an_op_computes_what_onnx_runtime_does(name: str, tmp_path: Path, unsimplified: None) -> None:
    case = CASES[name]
    path = saved(proto(case), tmp_path)
    rng = np.random.default_rng(7)
    feeds = {f"x{index}": each for index, each in enumerate(case.inputs) if isinstance(each, Feed)}
    samples = [{key: each.sample(rng) for key, each in feeds.items()} for _ in range(3)]
    if "halves" in name:
        samples = [{"x0": np.round(sample["x0"]) / 2} for sample in samples]
    expected = [in_onnxruntime(path, sample) for sample in samples]

    if name == "Cast half":  # the whole file becomes float32
        expected = [[sample["x0"]] for sample in samples]
    for outputs, found in zip(expected, run_converted(path, samples[:2])):
        compare(outputs, found)
    if case.open_batch:
        found, shapes = run_converted(path, samples, batch=True)
        axes = [shape.index(-1) for shape in shapes]
        joined = [np.concatenate([each[index] for each in expected], axis) for index, axis in enumerate(axes)]
        compare(joined, found)


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> None:
    assert len(expected) == len(found)
    for one, other in zip(expected, found):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(other, one, rtol=CLOSE, atol=CLOSE)


def test_every_rule_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == set(RULES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_paddle_cannot_do_is_refused(name: str, tmp_path: Path, unsimplified: None) -> None:
    case, words = REFUSED[name]
    path = saved(proto(case), tmp_path)
    with static_mode(), pytest.raises(UserError, match=words) as error:
        convert(read.read_onnx(path))
    assert str(error.value).startswith(f"{path}: op {case.op} (node 'the_node', output 'y0') cannot be imported: ")
    assert "\n" not in str(error.value)
