"""Which ops compute in INT8, which are reverted to float, and which strategy is selected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hard_models import harden, scaled_convolution
from sample_fixtures import reader_of_scenes, scenes_in

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.compress import compress
from act_pipeline.compress.accuracy_control.revert import dequantized, dequantized_ops, read_thresholds, revert_to_float
from act_pipeline.compress.job import Job
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.compress.plan.op_selection import select
from act_pipeline.compress.ptq.bias_correction import find_biases
from act_pipeline.compress.qat import state
from act_pipeline.compress.result.outcome import Measured
from act_pipeline.compress.result.summary import compression_table
from act_pipeline.config import Quantize, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import BelowFloor, UserError, run_command
from act_pipeline.engines import create_engine
from act_pipeline.evaluation.matching import agreement_of
from act_pipeline.graph.folding import prepare
from act_pipeline.graph.int8_rounding import rounded_weight
from act_pipeline.graph.quantizable_ops import QuantizableOp, quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lowered_onnx

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "sample.yml"
OP_TYPES = ("conv2d", "depthwise_conv2d", "matmul_v2")
HELD_OUT_IMAGES = 3
QUICK_SEARCH = "SmoothQuant={calib_images: 4, sample_rows: 128, search_alpha_step: 0.2}"


@dataclasses.dataclass
class Sample:
    """The sample's float model and a few scenes."""

    root: Path
    model: InferenceModel
    overrides: list[str]
    reader: list[str]

    def compress(self, name: str, *overrides: str):
        config = load_config(CONFIG, [*self.overrides, *overrides])
        with pytest.MonkeyPatch.context() as fewer:
            # `auto` runs each of the five calibrations on all of these.
            fewer.setattr("act_pipeline.calibration.feeds.HELD_OUT_IMAGES", HELD_OUT_IMAGES)
            # Speed and int8_reference score of the result do not affect the selection; test_compress.py tests them.
            fewer.setattr("act_pipeline.compress.pipeline.measure_chosen", lambda *chosen: Measured())
            return compress(config, self.root / name, "cpu", progress=False, reader_overrides=self.reader)


@pytest.fixture(scope="module")
def sample(sample_model: InferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    from act_pipeline.data.builtin_sample import make_sample

    root = tmp_path_factory.mktemp("strategies")
    make_sample(root / "data", 24, 12, seed=0, size=256)
    settings = [f"Global.model_dir={sample_model.directory}", "QuantPost.calib_images=12"]
    return Sample(root, sample_model, settings, scenes_in(root / "data"))


@pytest.fixture(scope="module")
def ptq(sample: Sample):
    """INT8 by calibration, with a part in float and a part with float activations."""
    return sample.compress(
        "ptq",
        "Strategy={name: ptq, max_drop: null}",
        "quantize.exclude=[head, '*.cross_attn']",
        "quantize.weight_only=['neck.encoder.*.self_attn']",
        "quantize.dynamic=['neck.encoder.*.linear?']",
    )


@pytest.fixture(scope="module")
def images(sample: Sample) -> dict[str, np.ndarray]:
    return next(iter(reader_of_scenes(sample.root / "data").loader("eval", batch_size=1, shuffle=False)))


def ops_of(model: InferenceModel, folder: Path) -> list[QuantizableOp]:
    with static_mode():
        return quantizable_ops(StaticGraph.load(prepare(model, folder)), OP_TYPES)


def test_every_op_of_an_rtdetr_has_its_official_name(sample: Sample, tmp_path: Path) -> None:
    ops = ops_of(sample.model, tmp_path / "float")
    assert len({op.name for op in ops}) == len(ops) == 121
    assert {op.group for op in ops} == {"backbone", "encoder", "decoder", "head"}
    modules = [op.module for op in ops]
    attention = {"q_proj", "k_proj", "v_proj", "qk", "av", "out_proj"}
    crossing = {"value_proj", "sampling_offsets", "attention_weights", "output_proj"}
    for prefix, roles in (
        ("neck.encoder.0.layers.0.self_attn", attention),
        *((f"transformer.decoder.layers.{layer}.self_attn", attention) for layer in (0, 1)),
        *((f"transformer.decoder.layers.{layer}.cross_attn", crossing) for layer in (0, 1)),
    ):
        inside = [name.removeprefix(f"{prefix}.") for name in modules if name.startswith(f"{prefix}.")]
        assert {name.split(".")[0] for name in inside} == roles
    by_module = {op.module: op for op in ops}
    assert by_module["transformer.dec_score_head.1"].group == "head"
    assert by_module["transformer.query_pos_head.layers.0"].group == "decoder"
    assert by_module["neck.input_proj.2"].type == "conv2d" and by_module["neck.input_proj.2"].weight_axis == 0
    assert by_module["transformer.query_pos_head.layers.0"].weight_axis == 1
    product = by_module["transformer.decoder.layers.0.self_attn.qk"]
    assert product.weight is None and len(product.activations) == 2
    # Each cross-attention's projections read the right tensors, independent of the order of the program.
    graph = {op.module: op.activations for op in ops}
    for layer in (0, 1):
        prefix = f"transformer.decoder.layers.{layer}.cross_attn"
        assert graph[f"{prefix}.sampling_offsets"] == graph[f"{prefix}.attention_weights"]
        for level in range(3):
            assert graph[f"transformer.enc_output.0.level_{level}"] == graph[f"{prefix}.value_proj.level_{level}"]


def test_a_graph_that_is_no_rtdetr_has_names_too(float_model: InferenceModel, tmp_path: Path) -> None:
    ops = ops_of(float_model, tmp_path / "float")
    assert ops and {op.group for op in ops} == {"model"} and all(op.module.startswith("model.") for op in ops)


OPS = [
    QuantizableOp("a", "conv2d", "backbone.conv2d_0", "backbone", ("x",), "w", 0),
    QuantizableOp("b", "matmul_v2", "neck.encoder.0.layers.0.self_attn.q_proj", "encoder", ("y",), "v", 1),
    QuantizableOp("c", "matmul_v2", "neck.encoder.0.layers.0.self_attn.qk", "encoder", ("p", "q"), None, -1),
    QuantizableOp("d", "matmul_v2", "transformer.dec_score_head.1", "head", ("z",), "u", 1),
]


@pytest.mark.parametrize(
    ("include", "exclude", "weight_only", "int8", "weights"),
    [
        ([], [], [], "abcd", ""),
        (["conv2d"], [], [], "a", ""),
        ([], ["head"], [], "abc", ""),
        ([], ["b"], [], "acd", ""),
        ([], ["neck.encoder"], [], "ad", ""),
        ([], ["neck.*.q_proj", "d"], [], "ac", ""),
        (["encoder", "head"], ["*.qk"], ["head"], "b", "d"),
        ([], [], ["encoder"], "ad", "b"),
    ],
)
def test_patterns_choose_ops(include, exclude, weight_only, int8: str, weights: str) -> None:
    found = select(OPS, Quantize(include, exclude, weight_only), Path("c.yml"))
    assert "".join(found.int8) == int8 and "".join(found.weight_only) == weights
    assert set(found.kept) == set("abcd") - set(int8) - set(weights)
    assert all(found.kept.values())


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        (Quantize(exclude=["heads"]), "'heads' matches none of the 4 ops.*did you mean 'head'"),
        (Quantize(include=["transformer.dec_score_haed.1"]), "did you mean 'transformer.dec_score_head.1'"),
        (Quantize(exclude=["conv2d", "matmul_v2"]), "leaves none of 4 ops in INT8"),
    ],
)
def test_a_pattern_without_an_op_is_refused(quantize: Quantize, words: str) -> None:
    with pytest.raises(UserError, match=words):
        select(OPS, quantize, Path("c.yml"))


def test_what_is_left_float_and_why_is_recorded(ptq) -> None:
    record = ptq.record
    kept = {entry["module"]: entry for entry in record["kept_ops"]}
    assert kept["transformer.dec_score_head.1"]["reason"] == "quantize.exclude: head"
    value = kept["transformer.decoder.layers.0.cross_attn.value_proj.level_0"]
    assert value["reason"] == "quantize.exclude: *.cross_attn"
    assert "it has no weight" in kept["neck.encoder.0.layers.0.self_attn.qk"]["reason"]
    assert {entry["module"].rsplit(".", 1)[1] for entry in record["weight_only_ops"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "linear1",
        "linear2",
    }
    dynamic = {entry["module"] for entry in record["weight_only_ops"] if entry["reason"] == "quantize.dynamic"}
    assert {module.rsplit(".", 1)[1] for module in dynamic} == {"linear1", "linear2"}
    everything = sum(record["quantized_ops"].values()) + len(kept) + len(record["weight_only_ops"])
    assert everything == record["quantizable_ops"] == 121
    assert record["steps"][0]["quantized"] == sum(record["quantized_ops"].values()) and record["steps"][0]["chosen"]


def test_the_saved_model_rounds_just_what_it_says(ptq) -> None:
    with static_mode():
        block = StaticGraph.load(ptq.model).program.global_block()
    producer = {name: op for op in block.ops for name in op.output_arg_names}
    kept = {entry["output"] for entry in ptq.record["kept_ops"]}
    weight_only = {entry["output"] for entry in ptq.record["weight_only_ops"]}
    for op in block.ops:
        if op.type in OP_TYPES:
            rounded = [name in producer and producer[name].type == "dequantize_linear" for name in op.input_arg_names]
            output = op.output_arg_names[0]
            assert any(rounded) == (output not in kept)
            assert all(rounded) == (output not in kept | weight_only)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "paddle_onednn"])
def test_engines_compute_a_mixed_model_as_paddle_does(ptq, images, engine: str) -> None:
    if engine != "paddle_onednn":
        pytest.importorskip("onnx")
        pytest.importorskip(engine)
    runs = [create_engine(name, ptq.model, "int8", "CPU", 1) for name in ("paddle", engine)]
    ours, theirs = (run.run(images) for run in runs)
    for run in runs:
        run.close()
    agreed, objects = agreement_of(ours, theirs)
    assert objects >= 2 and agreed / objects > 0.9


def test_the_lowering_says_what_a_mixed_model_keeps_float(ptq) -> None:
    pytest.importorskip("onnx")
    record = lowered_onnx(ptq.model, "tensorrt").record()
    assert sum(record["quantized"].values()) == sum(ptq.record["quantized_ops"].values())


def test_tensorrt_gets_no_int8_weights_of_ops_with_float_activations(ptq) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(lowered_onnx(ptq.model, "tensorrt").path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Conv")]
    weight_only = [node.name for node in products if [i in dequantized for i in node.input[:2]] == [False, True]]
    assert ptq.record["weight_only_ops"] and weight_only == []


def test_a_reverted_op_can_keep_its_int8_weight(sample: Sample, ptq, tmp_path: Path) -> None:
    with static_mode():
        source = prepare(sample.model, tmp_path / "float")
        graph = StaticGraph.load(ptq.model)
        name = next(op for op in graph.program.global_block().ops if op.type == "conv2d").output_arg_names[0]
        bias = next(bias.name for bias in find_biases(StaticGraph.load(source), ("conv2d",)) if bias.op == name)
        kinds, biases = {}, {}
        for kept in ((), (name,)):
            folder = tmp_path / f"back{len(kept)}"
            folder.mkdir()
            back = StaticGraph.load(revert_to_float(ptq.model, [name], folder, source, int8_weights=kept))
            ops = back.program.global_block().ops
            producer = {written: op.type for op in ops for written in op.output_arg_names}
            conv = next(op for op in ops if op.output_arg_names[0] == name)
            kinds[kept] = [producer.get(conv.input(slot)[0]) == "dequantize_linear" for slot in ("Input", "Filter")]
            biases[kept] = back.parameter(bias)
        assert kinds == {(): [False, False], (name,): [False, True]}
        # The corrected bias makes up for the rounding of the weight, and stays with it.
        np.testing.assert_array_equal(biases[()], StaticGraph.load(source).parameter(bias))
        np.testing.assert_array_equal(biases[name,], graph.parameter(bias))
        assert (biases[()] != biases[name,]).any()


def test_a_model_given_back_whole_is_the_float_model(sample: Sample, ptq, images, tmp_path: Path) -> None:
    """Weights, biases and activations: nothing of the quantization remains."""
    with static_mode():
        source = prepare(sample.model, tmp_path / "float")
        names = [op.name for op in quantizable_ops(StaticGraph.load(source), OP_TYPES)]
        (tmp_path / "back").mkdir()
        back = revert_to_float(ptq.model, names, tmp_path / "back", source)
        types = {op.type for op in StaticGraph.load(back).program.global_block().ops}
    assert not types & {"quantize_linear", "dequantize_linear"}
    assert back.params_path.stat().st_size == pytest.approx(source.params_path.stat().st_size, rel=0.01)
    expected, found = (
        create_engine("paddle_onednn", model, "fp32", "CPU", 1).run(images)["bbox"] for model in (source, back)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_the_float_model_of_an_int8_one_has_its_rounded_weights(ptq, sample: Sample, tmp_path: Path) -> None:
    with static_mode():
        exact = StaticGraph.load(prepare(sample.model, tmp_path / "float"))
        rounded = StaticGraph.load(dequantized(ptq.model, tmp_path / "rounded"))
        thresholds = read_thresholds(ptq.model)
        conv = next(op for op in rounded.program.global_block().ops if op.type == "conv2d")
        name = conv.input("Filter")[0]
        original = next(op for op in exact.program.global_block().ops if op.type == "conv2d").input("Filter")[0]
        weight, value = exact.parameter(original), rounded.parameter(name)
    step = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    assert 0 < np.abs(weight - value).max() and (np.abs(weight - value) <= step / 2 + 1e-6).all()
    assert all(limit > 0 for limit in thresholds.values()) and "image" in thresholds


def test_weights_of_the_float_model_of_an_int8_one_are_known_to_lie_on_the_steps_of_int8(
    ptq, sample: Sample, tmp_path: Path
) -> None:
    """Including square weights, which an INT8 model has transposed: rounding them again changes nothing."""
    with static_mode():
        ops = quantizable_ops(StaticGraph.load(prepare(sample.model, tmp_path / "float")), OP_TYPES)
        graph = StaticGraph.load(dequantized(ptq.model, tmp_path / "rounded"))
        kept = {entry["output"] for entry in ptq.record["kept_ops"]}
        found = [op for op in dequantized_ops(ptq.model, ops) if op.weight is not None and op.name not in kept]
        weights = {op.name: (graph.parameter(op.weight), op.weight_axis) for op in found}
    assert {axis for weight, axis in weights.values() if weight.ndim == 2} == {0, 1}
    for weight, axis in weights.values():
        np.testing.assert_allclose(rounded_weight(weight, axis), weight, atol=1e-6 * np.abs(weight).max())


@pytest.fixture
def two_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict `auto` to two calibrations, since each is written, exported and compiled."""
    monkeypatch.setattr("act_pipeline.compress.calibrating.ALGORITHMS", ("mse", "avg"))


@pytest.fixture(scope="module")
def hard(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """An op whose activations are hard to round, and the overrides that quantize it and eight ops around it."""
    model, name = harden(sample.model, sample.root / "hard_float", scaled_convolution)
    names = [op.name for op in ops_of(model, tmp_path_factory.mktemp("hard") / "float") if op.group == "backbone"]
    neighbours = names[max(names.index(name) - 4, 0) :][:9]
    return name, [f"Global.model_dir={model.directory}", f"quantize.include=[{', '.join(neighbours)}]"]


@pytest.mark.usefixtures("two_calibrations")
def test_auto_equalizes_the_channels_of_convolutions_before_it_reverts_ops(sample: Sample, hard) -> None:
    name, overrides = hard
    record = sample.compress("equalized", "Strategy={name: auto, max_drop: 0.02}", QUICK_SEARCH, *overrides).record
    # Calibration alone is so much worse on the held-out images that it is not even evaluated.
    assert [step["strategy"] for step in record["steps"]] == ["smooth_quant"] and record["map_drop"] <= 0.02
    assert record["given_back"] == [] and record["seconds"]["smooth"] > 0
    compared = record["equalization"]
    assert compared["kept"] and compared["change"] <= 0.95 * compared["without"] and compared["images"] == 3
    assert set(record["calibration"]["compared"]) == {"mse", "avg"}
    assert f"{compared['change']:.4f} (without: {compared['without']:.4f}" in compression_table(record)
    layer = next(entry for entry in record["smooth_quant"]["layers"] if name in entry["ops"])
    assert layer["smoothed"] and layer["folded"] and layer["sqnr_after_db"] > layer["sqnr_before_db"] + 10


def test_the_floor_gives_back_the_op_that_is_hard(sample: Sample, hard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_pipeline.compress.accuracy_control.ranker.RANK_IMAGES", 1)
    hard, overrides = hard
    # Three blocks of three: every op that could be reverted is measured alone, which takes some seconds each.
    record = sample.compress("hard", "Strategy={name: ptq, max_drop: 0.02}", *overrides).record
    assert record["steps"][0]["name"].startswith("ptq:") and not record["steps"][0]["meets_max_drop"]
    assert record["map_drop"] <= 0.02 and record["steps"][-1]["meets_max_drop"]
    given = record["given_back"]
    assert hard in [entry["output"] for entry in given] and len(given) <= 3
    assert given[-1]["map_after"] == record["int8"]["map"]
    # A channel of the weight is divided by 1,000, so that its INT8 weights would be zeros: they are float too.
    assert hard in {entry["output"] for entry in record["kept_ops"]}
    assert {entry["output"] for entry in given} <= {
        entry["output"] for entry in (*record["kept_ops"], *record["weight_only_ops"])
    }
    assert [step["chosen"] for step in record["steps"]].count(True) == 1
    assert record["strategy"] == "ptq" and record["max_drop"] == 0.02
    saved = json.loads((sample.root / "hard" / "act.json").read_text())
    assert saved["given_back"] == given


def test_auto_takes_the_cheapest_that_is_enough(sample: Sample) -> None:
    record = sample.compress("auto", "Strategy={name: auto, max_drop: 0.1}", "SmoothQuant.min_improvement=1.0").record
    assert "equalization" not in record and "smooth_quant" not in record
    assert [step["strategy"] for step in record["steps"]] == ["ptq"]
    compared = record["calibration"]["compared"]
    assert set(compared) == {"abs_max", "avg", "hist", "mse", "mce", "KL"}
    assert record["chosen"] == f"ptq:{min(compared, key=compared.get)}"
    with np.load(sample.root / "auto" / "detections.npz", allow_pickle=False) as stored:
        assert {"fp32", "int8"} <= set(stored.files) and stored["int8"].shape[1] == 7


@pytest.mark.parametrize(
    ("changes", "maps", "steps"),
    [
        ({"mse": 0.10, "avg": 0.11}, [0.1, 0.6], ["ptq:mse", "ptq:avg"]),  # nearly as good, and within the limit
        ({"mse": 0.11, "avg": 0.10}, [0.6], ["ptq:avg"]),  # the best one first; it is enough
        ({"mse": 0.10, "avg": 0.12}, [0.1, 0.6], ["ptq:mse", "smooth_quant:mse"]),  # clearly worse: not tried
    ],
)
def test_auto_tries_what_is_nearly_as_good_before_what_costs_time(
    sample: Sample,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, float],
    maps: list[float],
    steps: list[str],
) -> None:
    monkeypatch.setattr("act_pipeline.compress.calibrating._compare", lambda job, post, algorithms=None: changes)
    # With rounded residual connections each model would be evaluated twice (tests/test_residuals.py).
    monkeypatch.setattr("act_pipeline.compress.calibrating.round_residuals", lambda model, folder: (model, []))
    monkeypatch.setattr(Judge, "evaluate", scoring(*maps))
    record = sample.compress(
        f"near_{'_'.join(map(str, changes.values()))}", "Strategy={name: auto, max_drop: 0.2}", QUICK_SEARCH
    ).record
    # With equalized channels the held-out detections change as much as without.
    assert record["equalization"]["kept"] is False and record["equalization"]["without"] == min(changes.values())
    assert [step["name"] for step in record["steps"]] == steps
    assert record["chosen"] == steps[-1]


@pytest.mark.usefixtures("two_calibrations")
@pytest.mark.slow
def test_auto_trains_from_the_best_scales_when_nothing_cheaper_is_enough(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started, calibrated = Judge.evaluate, [], []
    set_averages = state.start_moving_averages

    def scored(judge, model, precision, *more):
        found = real(judge, model, precision, *more)
        if precision == "fp32" or started:
            return found
        calibrated.append(model)
        return dataclasses.replace(found, map=0.1)

    def noted(info, thresholds, place):
        started.append((set_averages(info, thresholds, place), thresholds))
        return started[-1][0]

    monkeypatch.setattr(Judge, "evaluate", scored)
    monkeypatch.setattr(
        "act_pipeline.compress.strategies.control_accuracy", lambda job, candidate, limit=None: candidate
    )
    monkeypatch.setattr(state, "start_moving_averages", noted)
    settings = ["TrainConfig.train_iter=2", "TrainConfig.eval_iter=2", "TrainConfig.snapshot_iter=null"]
    record = sample.compress("trained", "Strategy={name: auto, max_drop: 0.15}", *settings).record
    steps = [step["strategy"] for step in record["steps"]]
    assert set(steps[:-1]) == {"ptq", "smooth_quant"} and steps[-1] == "qat_dis"
    assert record["chosen"] == "qat_dis" and record["training"]["iterations"] == 2
    assert record["training"]["scales_from"] == record["steps"][0]["name"]
    count, thresholds = started[0]
    assert len(calibrated) == len(steps) - 1 and count > 100
    # A moving average of rate 0.9 is still close to its initial value after two steps.
    after = read_saved_thresholds(InferenceModel.load(sample.root / "trained"))
    ratios = np.array([after[name] / value for name, value in thresholds.items() if name in after])
    assert len(ratios) == len(after) > 100 and 0.8 < np.median(ratios) < 1.5


def read_saved_thresholds(model: InferenceModel) -> dict[str, float]:
    with static_mode():
        return read_thresholds(model)


def scoring(*maps: float):
    """Return an evaluation that replaces the mAPs of successive INT8 models by the given values."""
    real, given = Judge.evaluate, iter(maps)

    def scored(judge, model, precision, *more):
        found = real(judge, model, precision, *more)
        kept = precision == "fp32" or judge.is_reference
        return found if kept else dataclasses.replace(found, map=next(given))

    return scored


def test_below_the_floor_nothing_lies_under_the_good_name(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = scoring(0.30, 0.31)
    monkeypatch.setattr(Judge, "evaluate", scored)
    monkeypatch.setattr("act_pipeline.compress.accuracy_control.ranker.RANK_IMAGES", 1)

    def command(argv) -> int:
        sample.compress(
            "floored", "Strategy={name: ptq}", "quantize.include=['backbone.conv2d_0', 'backbone.conv2d_1']"
        )
        return 0

    assert run_command(command) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    below = sample.root / "floored.below_max_drop"
    assert "has 0.3100, and is saved in" in error and str(below) in error
    assert not (sample.root / "floored").exists()
    record = json.loads((below / "act.json").read_text())
    assert record["int8"]["map"] == 0.31 and len(record["given_back"]) == 1 and len(record["steps"]) == 2
    assert InferenceModel.load(below).content_hash() == record["model_hash"]


def test_a_trained_model_below_the_floor_names_the_section_that_it_was_trained_by(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = scoring(0.30, 0.31)
    monkeypatch.setattr(Judge, "evaluate", scored)
    monkeypatch.setattr("act_pipeline.compress.accuracy_control.ranker.RANK_IMAGES", 1)
    settings = ["TrainConfig.train_iter=1", "TrainConfig.eval_iter=1", "TrainConfig.snapshot_iter=null"]
    with pytest.raises(BelowFloor):
        sample.compress(
            "one_type",
            "Strategy={name: qat_dis}",
            "QuantAware.quantize_op_types=[matmul_v2]",
            "quantize.include=['transformer.enc_bbox_head.layers.0', 'transformer.dec_score_head.1']",
            *settings,
        )
    record = json.loads((sample.root / "one_type.below_max_drop" / "act.json").read_text())
    assert [step["strategy"] for step in record["steps"]] == ["qat_dis", "mixed"] and record["int8"]["map"] == 0.31
    assert len(record["given_back"]) == 1 and len(record["weight_only_ops"]) == 1
    reasons = {entry["reason"] for entry in record["kept_ops"] if entry["type"] == "conv2d"}
    assert reasons == {"not in QuantAware.quantize_op_types"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("Strategy.max_drop=-0.1", "Strategy.max_drop"),
        ("Global.Evaluation=false", "auto, which needs Global.Evaluation"),
        ("quantize.exclude=head", "quantize.exclude"),
        ("quantize.exlude=[head]", "did you mean 'exclude'"),
    ],
)
def test_bad_settings_are_one_line(sample: Sample, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(CONFIG, [*sample.overrides, override])


def test_a_sensitive_op_stays_float_unless_it_is_named() -> None:
    chosen = select(OPS, Quantize(), Path("c.yml"), {"a": "DFL"})
    assert "a" not in chosen.int8 and chosen.kept == {"a": "DFL"}
    assert "a" in select(OPS, Quantize(include=["a", "b"]), Path("c.yml"), {"a": "DFL"}).int8


def test_a_selection_gives_back_without_forgetting() -> None:
    found = select(OPS, Quantize(exclude=["head"], weight_only=["b"]), Path("c.yml")).revert_to_float(
        ["a", "b"], "too hard"
    )
    assert found.int8 == ["c"] and found.weight_only == () and found.kept["a"] == found.kept["b"] == "too hard"


def test_a_new_folder_of_the_job_is_new_after_an_earlier_one_was_removed(tmp_path: Path) -> None:
    """Accuracy control removes what is worse: of three candidates, each better than the last, the first two."""
    job = SimpleNamespace(work=tmp_path)
    first, second = (Job.folder(job, "mixed") for _ in range(2))  # type: ignore[arg-type]
    first.rmdir()
    third = Job.folder(job, "mixed")  # type: ignore[arg-type]
    assert third.is_dir() and third != second and sorted(tmp_path.iterdir()) == [second, third]
