"""Distributions and sensitivities: compared with NumPy, on a model with a hard op, interrupted, and in processes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_executors import StandInRay
from test_ptq import OPS, tiny_graph

from act_pipeline.analysis import executors
from act_pipeline.analysis.analyze import analyze
from act_pipeline.analysis.distributions import TensorObserver, observe_activations, weight_statistics
from act_pipeline.analysis.executors import measure_sensitivity
from act_pipeline.analysis.ledger import Ledger
from act_pipeline.analysis.sensitivity import (
    OpSensitivity,
    attention_shares,
    group_shares,
    ranked,
    summarize,
)
from act_pipeline.analysis.sensitivity_runner import SensitivityRunner
from act_pipeline.analysis.sensitivity_task import Task
from act_pipeline.analysis.table import analysis_table
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ANALYSIS_SCHEMA, read_record
from act_pipeline.demo import READER_CONFIG
from act_pipeline.evaluation.matching import agreement_of, iou, match
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.raw_outputs import RawOutputs, find_raw_outputs, signal_and_noise
from act_pipeline.graph.static_graph import StaticGraph, static_mode

# ---- matching --------------------------------------------------------------------------------------------------------


def test_iou_is_that_of_pixels_counted() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (2, 6, 2, 2))
    first, second = (np.concatenate([each.min(1), each.max(1)], axis=1) for each in corners)
    masks = []
    for boxes in (first, second):
        grid = np.zeros((6, 20, 20), bool)
        for mask, (x1, y1, x2, y2) in zip(grid, boxes):
            mask[y1:y2, x1:x2] = True
        masks.append(grid)
    common = (masks[0][:, None] & masks[1][None]).sum((2, 3))
    union = (masks[0][:, None] | masks[1][None]).sum((2, 3))
    np.testing.assert_allclose(iou(first, second), common / np.maximum(union, 1))


def test_detections_are_matched_one_to_one_within_their_class() -> None:
    box, near, far = [0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]
    first = np.array([[0, 0.9, *box], [1, 0.8, *far], [0, 0.31, *far], [0, 0.1, 20, 20, 30, 30], [-1, 0.9, *box]])
    second = np.array([[0, 0.45, *near], [0, 0.5, *near], [0, 0.29, *far], [1, 0.7, *box], [-1, 0.9, *box]])
    found = match(first, second)
    assert found.pairs.tolist() == [[2, 2], [0, 1]]
    np.testing.assert_allclose(found.iou, [1, 0.8])
    np.testing.assert_allclose(found.agreement, [0.29 / 0.31, 0.8 * 0.5 / 0.9])
    assert found.missed.tolist() == [1] and found.added.tolist() == [0, 3] and found.counted == 5
    assert match(first, second, min_iou=0.85).pairs.tolist() == [[2, 2]]
    same = match(first, first)
    assert same.agreement.tolist() == [1, 1, 1] and same.counted == 3


def test_agreement_is_summed_over_the_images_of_a_batch() -> None:
    one = {"bbox": np.float32([[0, 0.9, 0, 0, 1, 1], [0, 0.9, 0, 0, 1, 1]]), "bbox_num": np.int32([1, 1])}
    other = {"bbox": np.float32([[0, 0.9, 0, 0, 1, 1], [0, 0.9, 5, 5, 6, 6]]), "bbox_num": np.int32([1, 1])}
    assert agreement_of(one, one) == (2, 2)
    assert agreement_of(one, other) == (1, 3)
    nothing = {"bbox": np.zeros((0, 6), np.float32), "bbox_num": np.int32([0, 0])}
    assert agreement_of(nothing, nothing) == (0, 0) and agreement_of(one, nothing) == (0, 2)


# ---- outputs ---------------------------------------------------------------------------------------------------------

RAW = RawOutputs("scores", "boxes", "queries")


def raw_outputs(seed: int = 0, places: Sequence[int] = (3, 1, 7)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "scores": rng.random((1, len(places), 2)).astype(np.float32),
        "boxes": rng.random((1, len(places), 4)).astype(np.float32),
        "queries": np.int64([places]),
    }


def test_signal_and_noise_are_numpys_and_the_order_of_queries_means_nothing() -> None:
    exact, other = raw_outputs(0), raw_outputs(1)

    def vectors(outputs):
        best = outputs["scores"].max(2, keepdims=True)
        return np.concatenate([outputs["scores"], outputs["boxes"] * best], axis=2).astype(np.float64)

    signal, noise = signal_and_noise(exact, other, RAW)
    assert signal == pytest.approx((vectors(exact) ** 2).sum(), rel=1e-6)
    assert noise == pytest.approx(((vectors(exact) - vectors(other)) ** 2).sum(), rel=1e-6)
    turned = {name: value[:, [2, 0, 1]] for name, value in other.items()}
    assert signal_and_noise(exact, turned, RAW)[1] == pytest.approx(noise, rel=1e-9)
    assert signal_and_noise(exact, exact, RAW)[1] == 0


def test_a_query_without_a_partner_is_all_noise() -> None:
    exact = raw_outputs(0)
    other = {**exact, "queries": np.int64([[3, 1, 8]])}
    lost = np.concatenate([exact["scores"][0, 2], exact["boxes"][0, 2] * exact["scores"][0, 2].max()])
    assert signal_and_noise(exact, other, RAW)[1] == pytest.approx(2 * (lost.astype(np.float64) ** 2).sum(), rel=1e-6)


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_statistics_are_numpys() -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((8, 6, 30, 30)) * np.arange(1, 7)[:, None, None]).astype(np.float32)
    values[3, 2, 4, 5] = -300
    observer = TensorObserver(1)
    for start in (0, 4):
        for each in observer.observers:
            each.update(values[start : start + 4], 4)
    found = observer.statistics()
    absolute = np.abs(values.astype(np.float64))
    rms = np.sqrt((absolute**2).mean())
    channels = absolute.max(axis=(0, 2, 3))
    assert (found["min"], found["max"], found["abs_max"]) == (values.min(), values.max(), 300)
    assert found["rms"] == pytest.approx(rms, rel=1e-3)
    for name, share in (("p25", 0.25), ("p50", 0.5), ("p99_9", 0.999), ("p99_99", 0.9999)):
        assert found[name] == pytest.approx(np.quantile(absolute, share, method="inverted_cdf"), rel=2e-3)
    assert found["outlier_ratio"] == pytest.approx((absolute > 6 * rms).mean(), rel=0.02) and found["outlier_ratio"] > 0
    assert found["channel_spread"] == pytest.approx(channels.max() / np.median(channels)) and found["channels"] == 6
    assert found["worst_channel"] == 2 and found["channel_abs_max"]["p50"] == pytest.approx(np.median(channels))
    counts, _ = np.histogram(absolute, bins=64, range=(0, 300))
    assert sum(found["histogram"]["counts"]) == pytest.approx(values.size, abs=64)
    assert np.abs(np.cumsum(found["histogram"]["counts"]) - np.cumsum(counts)).max() < 0.01 * values.size
    assert not observer.constant


def test_constants_and_zeros_have_statistics_too() -> None:
    for value in (0.0, -0.25):
        observer = TensorObserver(1)
        for each in observer.observers:
            each.update(np.full((2, 3, 4), value, np.float32), 2)
        found = observer.statistics()
        assert observer.constant and found["min"] == found["max"] == value and found["outlier_ratio"] == 0
        assert found["p99_9"] == pytest.approx(abs(value), rel=1e-3)
        json.dumps(found, allow_nan=False)
        assert found["channel_spread"] == (1 if value else None)


def test_weights_are_looked_at_by_output_channel(tmp_path: Path) -> None:
    with static_mode():
        graph = StaticGraph.load(tiny_graph(tmp_path / "m"))
        ops = quantizable_ops(graph, OPS)
        found = weight_statistics(graph, ops)
        assert set(found) == {"w0", "w1", "w2"} and found["w0"]["channels"] == 6 and found["w2"]["channels"] == 5
        channels = np.abs(graph.parameter("w2")).max(0)
        assert found["w2"]["channel_spread"] == pytest.approx(channels.max() / np.median(channels))
    assert {name: seen.extent.axis for name, seen in observe_activations(ops).items()}["image"] == 1


# ---- sensitivity -----------------------------------------------------------------------------------------------------


def hard_graph(folder: Path) -> InferenceModel:
    """Return four convolutions; before the third, one channel is scaled by 1,000 and its weights by the inverse."""
    import paddle

    rng = np.random.default_rng(3)

    def weight(name: str, scale=1.0):
        value = (rng.standard_normal((8, 8, 3, 3)) / 8 * scale).astype(np.float32)
        return paddle.create_parameter(
            [8, 8, 3, 3], "float32", attr=paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(value))
        )

    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        x = paddle.static.data("image", [-1, 8, 16, 16], "float32")
        inputs = [x]
        factor = np.ones((1, 8, 1, 1), np.float32)
        factor[0, 5] = 1000
        for index in range(4):
            if index == 2:
                x = x * paddle.assign(factor)
            x = paddle.nn.functional.relu(
                paddle.nn.functional.conv2d(x, weight(f"w{index}", 1 / factor if index == 2 else 1.0))
            )
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        folder.mkdir(parents=True)
        paddle.static.save_inference_model(str(folder / "model"), inputs, [x], executor, program=main)
    return InferenceModel.load(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The model with the hard op, and six images in two batches."""
    with static_mode():
        model = hard_graph(tmp_path_factory.mktemp("hard") / "m")
        graph = StaticGraph.load(model)
        ops = quantizable_ops(graph, OPS)
        image = np.random.default_rng(0).random((6, 8, 16, 16)).astype(np.float32)
        import paddle

        with paddle.static.scope_guard(graph.scope):
            names = [op.activations[0] for op in ops]
            values = graph.executor.run(graph.program, feed={"image": image}, fetch_list=names)
    thresholds = {name: float(np.abs(value).max()) for name, value in zip(names, values)}
    return Task.of(model, ops, thresholds, [{"image": image[:4]}, {"image": image[4:]}])


@pytest.fixture(scope="module")
def serial(task: Task) -> list[OpSensitivity]:
    return measure_sensitivity(task, progress=False)


def test_the_op_that_was_made_hard_is_the_most_sensitive(task: Task, serial: list[OpSensitivity]) -> None:
    assert [op.name for op in serial] == [op.name for op in task.ops] and len(serial) == 4
    worst = ranked(serial)[0]
    assert worst.name == task.ops[2].name and worst.share > 0.9
    assert worst.sqnr_db < 20 < min(op.sqnr_db for op in serial if op is not worst)
    assert sum(op.share for op in serial) == pytest.approx(1)


def test_sums_over_batches_are_those_of_one_batch(task: Task, serial: list[OpSensitivity]) -> None:
    together = np.concatenate([batch["image"] for batch in task.batches])
    whole = Task("another", task.program, task.params, task.ops, task.thresholds, ({"image": together},), task.device)
    for one, other in zip(measure_sensitivity(whole, progress=False), serial):
        assert one.error == pytest.approx(other.error, rel=1e-4)


def test_figures_are_summed_up_as_defined(task: Task) -> None:
    measurements = [
        {"op": op.name, "batch": batch, "signal": 100.0, "noise": noise, "agreement": 3.0, "objects": 4}
        for batch in (0, 1)
        for op, noise in zip(task.ops, (1.0, 0.0, 3.0, 1e-12))
    ]
    found = summarize(task.ops, measurements)
    assert [round(op.sqnr_db, 3) for op in found] == [20, 140, 15.229, 140]
    assert found[2].share == pytest.approx(0.75) and found[0].detection_change == 0.25 and found[0].map is None


def test_groups_and_attentions_share_the_error() -> None:
    modules = [
        ("backbone.conv2d_0", "backbone", 0.5),
        ("neck.encoder.0.layers.0.self_attn.qk", "encoder", 0.2),
        ("neck.encoder.0.layers.0.self_attn.out_proj", "encoder", 0.1),
        ("transformer.decoder.layers.1.cross_attn.value_proj", "decoder", 0.15),
        ("transformer.decoder.layers.1.linear1", "decoder", 0.05),
    ]
    ops = [OpSensitivity(module, "conv2d", module, group, 0, share, share, 0) for module, group, share in modules]
    groups = {group["name"]: (group["ops"], round(group["share"], 6)) for group in group_shares(ops)}
    assert groups == {"backbone": (1, 0.5), "encoder": (2, 0.3), "decoder": (2, 0.2)}
    attentions = {group["name"]: (group["ops"], round(group["share"], 6)) for group in attention_shares(ops)}
    assert attentions == {
        "neck.encoder.0.layers.0.self_attn": (2, 0.3),
        "transformer.decoder.layers.1.cross_attn": (1, 0.15),
    }


def test_a_broken_off_run_goes_on_where_it_was(
    task: Task, serial: list[OpSensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sensitivity.jsonl"
    measured: list = []

    class Interrupted(SensitivityRunner):
        def __call__(self, unit):
            measured.append(unit)
            if len(measured) == 4:
                raise KeyboardInterrupt
            return super().__call__(unit)

    monkeypatch.setattr(executors, "SensitivityRunner", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(task, Ledger(path, task.key), progress=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"op": "torn')
    first = list(measured)
    found = measure_sensitivity(task, Ledger(path, task.key), progress=False)
    assert sorted(first[:3] + measured[4:]) == sorted(task.units) and len(measured) == 4 + len(task.units) - 3
    assert found == serial
    assert measure_sensitivity(task, Ledger(path, task.key), progress=False) == serial
    assert len(measured) == 4 + len(task.units) - 3
    assert Ledger(path, "of something else").measurements == []
    assert Ledger(path, task.key).measurements == []


def test_two_processes_measure_what_one_does(task: Task, serial: list[OpSensitivity], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", task.key)
    found = measure_sensitivity(task, ledger, workers=2, progress=False)
    assert [op.name for op in found] == [op.name for op in serial] and len(ledger.measurements) == len(task.units)
    for one, other in zip(found, serial):
        assert one.error == pytest.approx(other.error, rel=1e-5)


def test_the_task_says_what_is_measured(task: Task, tmp_path: Path) -> None:
    model = InferenceModel(tmp_path)
    model.model_path.write_bytes(task.program)
    model.params_path.write_bytes(task.params)
    same = Task.of(model, task.ops, task.thresholds, task.batches)
    assert same.key == task.key
    first = task.ops[0].activations[0]
    other = {**task.thresholds, first: task.thresholds[first] * 1.01}
    assert Task.of(model, task.ops, other, task.batches).key != task.key
    assert Task.of(model, task.ops, task.thresholds, task.batches[:1]).key != task.key
    assert Task.of(model, task.ops, task.thresholds, task.batches, source_hash="sha256:1").key != task.key


def test_ray_measures_the_same_with_the_same_function(
    task: Task, serial: list[OpSensitivity], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = StandInRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert measure_sensitivity(task, executor="ray", ray_address="auto", progress=False) == serial
    assert ray.calls == ["init auto", "shutdown"]


# ---- the whole analysis ----------------------------------------------------------------------------------------------

CONFIG = """
Global: {{reader_config: {reader}, model_dir: {model}, Evaluation: false}}
Strategy: {{name: ptq}}
QuantPost: {{calib_images: 6, quantize_op_types: {types}}}
"""


def config_of(demo, folder: Path, model: Path | None = None, types: str = "[depthwise_conv2d]"):
    path = folder / "analysis.yml"
    path.write_text(CONFIG.format(reader=READER_CONFIG, model=model or demo.fp32.directory, types=types))
    return load_config(path)


def test_an_analysis_of_the_sample(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"progress": False, "reader_overrides": demo.places, "sensitivity_images": 1, "map_images": 1}
    made = analyze(config_of(demo, tmp_path), tmp_path / "out", **options)
    record = read_record(tmp_path / "out" / "analysis.json", ANALYSIS_SCHEMA)
    assert record == made.record and record["images"] == 6 and record["sensitivity"]["images"] == 1
    assert {op["type"] for op in record["ops"]} == {"depthwise_conv2d"}
    assert {op["group"] for op in record["ops"]} == {"backbone"}
    for op in record["ops"]:
        (part,) = op["activations"]
        assert 0 < part["threshold"] <= part["abs_max"] and part["p99_9"] <= part["p99_99"] <= part["abs_max"]
        assert 0 <= op["detection_change"] <= 1 and 0 <= op["map"] <= 1 and op["weight"]["channels"] > 1
    assert record["ranking"][0] == max(record["ops"], key=lambda op: op["error"])["name"]
    names = ["activations.png", "weights.png", "histograms.png", "sensitivity.png", "groups.png"]
    assert [path.name for path in made.plots] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in made.plots)

    monkeypatch.setattr(executors, "SensitivityRunner", None)  # nothing is measured twice
    again = analyze(config_of(demo, tmp_path), tmp_path / "out", **options)
    assert again.record["ops"] == record["ops"]


def test_an_rtdetrs_raw_outputs_are_found(demo) -> None:
    with static_mode():
        graph = StaticGraph.load(demo.fp32)
        raw = find_raw_outputs(graph)
        assert raw is not None
        block = graph.program.global_block()
        scores, boxes, queries = (tuple(block.var(name).shape) for name in raw.names)
    assert scores[2] == 10 and boxes[1:] == (scores[1], 4) and queries[1:] == scores[1:2]


def damaged(demo, folder: Path, value: float) -> tuple[Path, str]:
    """Return the sample's model with a BatchNorm that outputs ``value`` everywhere, and the convolution reading it."""
    shutil.copytree(demo.fp32.directory, folder)
    with static_mode():
        graph = StaticGraph.load(InferenceModel.load(folder))
        ops = list(graph.program.global_block().ops)

        def reader(name: str):
            found = [op for op in ops if name in op.input_arg_names]
            return found[0] if len(found) == 1 else None

        for norm in (op for op in ops if op.type == "batch_norm"):
            after = reader(norm.output("Y")[0])
            last = reader(after.output("Out")[0]) if after is not None and after.type == "relu" else None
            if last is not None and last.type == "conv2d":
                break
        for slot, wanted in (("Scale", 0.0), ("Bias", value)):
            name = norm.input(slot)[0]
            graph.set_parameter(name, np.full_like(graph.parameter(name), wanted))
        output = last.output_arg_names[0]
        graph.save(folder)
    return folder, output


def test_constant_activations_are_named_with_their_op(demo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, op = damaged(demo, tmp_path / "constant", 0.25)
    config = config_of(demo, tmp_path, folder, "[conv2d]")
    with caplog.at_level("WARNING"):
        made = analyze(
            config, tmp_path / "out", images=2, sensitivity=False, progress=False, reader_overrides=demo.places
        )
    (line,) = [entry.getMessage() for entry in caplog.records if "constant" in entry.getMessage()]
    assert f"read by conv2d ({op})" in line and "on all 2 calibration images" in line
    assert "largest / 99.9%" in analysis_table(made.record)
    assert made.record["constant_activations"] and made.sensitivities == [] and made.record["sensitivity"] is None
    assert [path.name for path in made.plots] == ["activations.png", "weights.png", "histograms.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "--images is 0, expected at least 1"),
        ({"workers": 0}, "--workers is 0"),
        ({"executor": "dask"}, "--executor is 'dask', expected one of local, ray"),
        ({"model": "infinite"}, r"tensor .*, read by conv2d .* holds an infinite value on calibration image 1;"),
        ({"reader": ["TrainDataset.image_dir=nowhere"]}, "nowhere"),
        ({"types": "[matmul]"}, "has no op of quantize_op_types"),
    ],
)
def test_bad_input_is_one_line(demo, tmp_path: Path, options: dict, words: str) -> None:
    folder = damaged(demo, tmp_path / "model", float("inf"))[0] if options.pop("model", None) else None
    reader = [*demo.places, *options.pop("reader", [])]
    config = config_of(demo, tmp_path, folder, options.pop("types", "[conv2d]"))
    with pytest.raises(UserError, match=words) as error:
        analyze(config, tmp_path / "out", progress=False, reader_overrides=reader, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "analysis.json").exists()


def test_fewer_images_than_asked_for_are_said(demo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = [*demo.places, "TrainDataset.sample_num=3"]
    with caplog.at_level("WARNING"):
        made = analyze(
            config_of(demo, tmp_path), tmp_path / "out", sensitivity=False, progress=False, reader_overrides=reader
        )
    assert made.record["images"] == 3 and made.record["images_asked"] == 6
    assert any("has 3 images, 6 are required" in entry.getMessage() for entry in caplog.records)


def test_the_command_prints_the_most_sensitive(demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from act_pipeline.cli import analyze as command

    config_of(demo, tmp_path)
    reader = tmp_path / "reader.yml"
    text = Path(READER_CONFIG).read_text().replace("dataset/sample", str(demo.root / "data"))
    reader.write_text(text)
    arguments = ["-c", str(tmp_path / "analysis.yml"), "--output_dir", str(tmp_path / "out"), "--images", "2"]
    opt = ["-o", f"Global.reader_config={reader}"]
    assert command.main([*arguments, "--sensitivity_images", "1", *opt]) == 0
    printed = capsys.readouterr().out
    assert "most sensitive" in printed and "shares of the error: backbone 100.0%" in printed


def test_a_ledger_keeps_measurements_only(tmp_path: Path) -> None:
    """Other lines in the file are dropped, and the run resumes from the measurements."""
    good = {"op": "a", "batch": 0, "signal": 1.0, "noise": 0.5, "agreement": 1.0, "objects": 2}
    lines = [{"key": "k"}, good, {"op": "b"}, {**good, "noise": "much"}, {**good, "op": 3}, [1]]
    path = tmp_path / "sensitivity.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n" + "[" * 100_000 + '\n{"op": "a", "ba')
    assert Ledger(path, "k").measurements == [good]
    assert Ledger(path, "k").measurements == [good] and Ledger(path, "other").measurements == []
