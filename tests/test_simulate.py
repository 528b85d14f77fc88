"""Ops switched to INT8 in memory: compared with the float model, the saved INT8 model, and NumPy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from test_ptq import CONFIG, OPS, int8, run, tiny_graph
from test_ptq import images as tiny_images

from act_pipeline.analysis.simulation import Simulation
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.demo import READER_CONFIG
from act_pipeline.engines import create_engine
from act_pipeline.graph.folding import prepare
from act_pipeline.graph.int8_rounding import weight_threshold
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def ops_of(model: InferenceModel):
    with static_mode():
        return quantizable_ops(StaticGraph.load(model), OPS)


def saved_int8(model: InferenceModel, folder: Path, feed) -> tuple[InferenceModel, dict[str, float]]:
    """Save the output of post-training quantization without bias correction."""
    path = folder / "ptq.yml"
    path.write_text(
        CONFIG.format(
            reader=READER_CONFIG,
            model=model.directory,
            evaluation="false",
            images=8,
            algo="abs_max",
            bias_correction="false",
        )
    )
    (folder / "int8").mkdir()
    with static_mode():
        made = PostTraining(model, load_config(path), lambda: iter([feed])).write(folder / "int8")
    return made.model, made.thresholds


class Tiny:
    """The tiny graph of the quantization tests, with its tensors as taps."""

    def __init__(self, folder: Path) -> None:
        with static_mode():
            graph = StaticGraph.load(tiny_graph(folder / "raw"))
            graph.unwrap_outputs()
            self.output = graph.fetch_targets[0].name
            self.model = tiny_graph(folder / "m")
        self.ops = ops_of(self.model)
        self.feed = {"image": tiny_images(4)}
        self.int8, self.thresholds = saved_int8(self.model, folder, self.feed)

    def float_tensors(self, names):
        with static_mode():
            return dict(zip(names, run(StaticGraph.load(self.model), list(names), self.feed["image"])))

    def open(self, **options) -> Simulation:
        simulation = Simulation(self.model, self.ops, **options)
        simulation.set_thresholds(self.thresholds)
        return simulation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["whole", "held"])
def held(request: pytest.FixtureRequest) -> bool:
    return request.param == "held"


def test_none_in_int8_is_the_float_model(tiny: Tiny, held: bool) -> None:
    names = [op.name for op in tiny.ops]
    expected = tiny.float_tensors(names)
    with contextlib.closing(tiny.open(taps=names)) as simulation:
        first = simulation.hold(tiny.feed) if held else {}
        found = simulation.run(tiny.feed, ())
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
        if held:
            np.testing.assert_array_equal(found[name], first[name])


def test_all_in_int8_is_the_saved_model_bit_for_bit(tiny: Tiny, held: bool) -> None:
    with static_mode():
        graph = StaticGraph.load(tiny.int8)
        expected = run(graph, graph.fetch_targets, tiny.feed["image"])[0]
    with contextlib.closing(tiny.open(onednn=False)) as simulation:
        if held:
            simulation.hold(tiny.feed)
        found = simulation.run(tiny.feed, [op.name for op in tiny.ops])
    np.testing.assert_array_equal(found["bbox"], expected)


def test_one_op_in_int8_is_numpys_and_changes_nothing_before_it(tiny: Tiny, held: bool) -> None:
    op = next(op for op in tiny.ops if op.type == "matmul_v2" and op.weight)
    names = [other.name for other in tiny.ops]
    exact = tiny.float_tensors([op.activations[0], *names])
    with static_mode():
        weight = StaticGraph.load(tiny.model).parameter(op.weight)
    rounded = int8(weight, weight_threshold(weight, 1)).astype(np.float32)
    source = exact[op.activations[0]]
    both = int8(source, tiny.thresholds[op.activations[0]]) @ rounded
    with contextlib.closing(tiny.open(taps=names)) as simulation:
        if held:
            simulation.hold(tiny.feed)
        found = simulation.run(tiny.feed, {op.name})
        weight_only = simulation.run(tiny.feed, (), {op.name})
        again = simulation.run(tiny.feed, ())
    for name in names[: names.index(op.name)]:
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[op.name], both, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weight_only[op.name], source @ rounded, rtol=1e-4, atol=1e-4)
    assert np.abs(both - source @ rounded).max() > 1e-3 and np.abs(found[op.name] - exact[op.name]).max() > 1e-3
    np.testing.assert_allclose(again[op.name], exact[op.name], rtol=1e-5, atol=1e-5)


def test_what_is_held_gives_what_a_whole_run_gives(tiny: Tiny) -> None:
    choices = [{op.name} for op in tiny.ops] + [{tiny.ops[0].name, tiny.ops[-1].name}, {op.name for op in tiny.ops}]
    with contextlib.closing(tiny.open()) as simulation:
        whole = [simulation.run(tiny.feed, choice)["bbox"] for choice in choices]
        simulation.hold(tiny.feed)
        for choice, expected in zip(choices, whole):
            np.testing.assert_array_equal(simulation.run(tiny.feed, choice)["bbox"], expected)
    assert len({values.tobytes() for values in whole}) == len(choices)


def test_another_batch_or_threshold_is_never_taken_for_the_one_held(tiny: Tiny) -> None:
    last = tiny.ops[-1]
    with contextlib.closing(tiny.open()) as simulation:
        other = {"image": tiny_images(6)[4:]}
        expected = simulation.run(other, {last.name})["bbox"]
        simulation.hold(tiny.feed)
        np.testing.assert_array_equal(simulation.run(other, {last.name})["bbox"], expected)
        simulation.hold(other)
        np.testing.assert_array_equal(simulation.run(other, {last.name})["bbox"], expected)
        simulation.set_thresholds({last.activations[0]: tiny.thresholds[last.activations[0]] / 8})
        assert np.abs(simulation.run(other, {last.name})["bbox"] - expected).max() > 1e-2


def test_a_batch_is_its_images(tiny: Tiny, held: bool) -> None:
    names = {op.name for op in tiny.ops}
    with contextlib.closing(tiny.open(onednn=False)) as simulation:
        if held:
            simulation.hold(tiny.feed)
        together = simulation.run(tiny.feed, names)["bbox"]
        alone = [simulation.run({"image": tiny.feed["image"][n : n + 1]}, names)["bbox"] for n in range(4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_wrong_names_are_refused(tiny: Tiny) -> None:
    with contextlib.closing(Simulation(tiny.model, tiny.ops)) as simulation:
        with pytest.raises(ValueError, match="nothing is none of the 4 quantizable ops"):
            simulation.run(tiny.feed, {"nothing"})
        with pytest.raises(ValueError, match=f"read by {tiny.ops[0].name}, has no threshold"):
            simulation.run(tiny.feed, {tiny.ops[0].name})
    with pytest.raises(ValueError, match="no op gives the tensor nothing"):
        Simulation(tiny.model, tiny.ops, taps=["nothing"])


@pytest.fixture(scope="module")
def sample(demo, tmp_path_factory: pytest.TempPathFactory):
    """The sample's prepared float model, three scenes, and the INT8 model calibrated on them."""
    reader = demo.reader()
    batch = next(iter(reader.loader("eval", batch_size=3, shuffle=False, drop_last=False)))
    feed = {name: np.asarray(batch[name], np.float32) for name in ("image", "im_shape", "scale_factor")}
    folder = tmp_path_factory.mktemp("simulate")
    with static_mode():
        model = prepare(demo.fp32, folder / "float")
    return (model, feed, *saved_int8(model, folder, feed))


def test_the_sample_is_its_float_and_its_int8_model(sample, held: bool) -> None:
    import paddle

    model, feed, saved, thresholds = sample
    ops = ops_of(model)
    with contextlib.closing(create_engine("paddle_onednn", model, "fp32", "CPU")) as engine:
        float_outputs = engine.run(feed)
    with static_mode():
        graph = StaticGraph.load(saved)
        with paddle.static.scope_guard(graph.scope):
            int8_boxes = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)[0]
    found = []
    for onednn, names in ((True, ()), (False, [op.name for op in ops])):
        with contextlib.closing(Simulation(model, ops, onednn=onednn)) as simulation:
            simulation.set_thresholds(thresholds)
            if held:
                simulation.hold(feed)
            found.append(simulation.run(feed, names))
    np.testing.assert_array_equal(found[1]["bbox"], int8_boxes)
    np.testing.assert_array_equal(found[0]["bbox_num"], float_outputs["bbox_num"])
    best = float_outputs["bbox"][:, 1] > 0.3
    np.testing.assert_allclose(found[0]["bbox"][best], float_outputs["bbox"][best], atol=1e-3, rtol=1e-4)
    assert best.sum() > 10 and np.abs(found[0]["bbox"][best] - found[1]["bbox"][best]).max() > 0.1


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


def test_what_is_closed_gives_its_memory_back(tmp_path: Path) -> None:
    """Paddle keeps scopes until the process ends, unless they are released explicitly."""
    import paddle

    with static_mode():
        main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            image = paddle.static.data("image", [-1, 4], "float32")
            weight = paddle.create_parameter([4, 5_000_000], "float32")
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            output = paddle.matmul(image, weight).sum(-1)
            paddle.static.save_inference_model(str(tmp_path / "model"), [image], [output], executor, program=main)
        model = InferenceModel.load(tmp_path)
    ops, feed = ops_of(model), {"image": np.ones((1, 4), np.float32)}
    assert len(ops) == 1

    def use() -> float:
        with contextlib.closing(Simulation(model, ops)) as simulation:
            simulation.set_thresholds({"image": 1.0})
            simulation.hold(feed)
            simulation.run(feed, {ops[0].name})
        return resident_mb()

    before = [use() for _ in range(3)][-1]
    after = [use() for _ in range(4)][-1]
    assert after - before < 80, "each of four has 80 MB of weights, and kept them"
