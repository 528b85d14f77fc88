"""From a float model to an INT8 one: the saved model is the evaluated one, and no incomplete file remains."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import TRAINED

from act_pipeline.calibration.feeds import held_out_feeds
from act_pipeline.compress import compress
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.records import read_record
from act_pipeline.demo import COMPRESS_CONFIG, run_demo
from act_pipeline.engines import create_engine
from act_pipeline.evaluation import detection_change, evaluate
from act_pipeline.evaluation.result import EvalRecord
from act_pipeline.graph.folding import fold_batch_norm, fold_constants
from act_pipeline.graph.static_graph import StaticGraph, static_mode

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def ops_of(model: InferenceModel) -> list:
    with static_mode():
        return StaticGraph.load(model).program.global_block().ops


def test_the_int8_model_detects_as_well_at_a_third_of_the_size(demo) -> None:
    record = demo.compressed.record
    assert record["fp32"]["map"] >= 0.5
    assert abs(record["map_drop"]) <= 0.01
    assert record["bytes_ratio"] <= 0.32
    assert record["int8"]["bytes"] == demo.compressed.model.bytes


def test_act_json_is_as_designed(demo) -> None:
    path = demo.compressed.model.directory / "act.json"
    record = json.loads(path.read_text())
    assert record["schema"] == "act_pipeline.act/1"
    assert {
        "strategy",
        "fp32",
        "int8",
        "map_drop",
        "bytes_ratio",
        "seconds",
        "quantized_ops",
        "kept_ops",
        "versions",
        "config",
        "source_hash",
    } <= set(record)
    assert set(record["fp32"]) == set(record["int8"]) >= {"map", "map50", "bytes", "stats", "per_class", "latency_ms"}
    assert record["source_hash"] == demo.fp32.content_hash()
    assert record["map_drop"] == pytest.approx(record["fp32"]["map"] - record["int8"]["map"])
    stages = ("prepare", "evaluate_fp32", "calibrate", "train", "evaluate_int8", "compare", "latency", "reference")
    assert set(record["seconds"]) == set(stages)
    assert record["evaluation"]["engine"] == record["evaluation"]["fp32_engine"] == "openvino"
    latency = record["latency"]
    assert latency["rounds"] >= 10 and latency["ratio"] > 0
    assert all(0 < latency[label]["p50_ms"] <= latency[label]["p90_ms"] for label in ("fp32", "int8"))
    assert record["reference"]["engine"] == "int8_reference" and record["reference"]["images"] == 64
    assert record["reference"]["map"] > 0.5
    training = record["training"]
    assert training["iterations"] == 20 and len(training["loss"]) == 20
    # Before the first step it is a calibrated model, which training should improve.
    assert [entry["iteration"] for entry in training["evaluations"]] == [0, 10, 20]
    assert training["evaluations"][0]["agreement"] > 0.8 and training["scales_from"] == "ptq:avg, 16 images"
    assert training["held_out_images"] == 32


def test_eval_json_is_as_designed_and_agrees_with_act_json(demo) -> None:
    record = json.loads((demo.root / "output" / "eval_int8_openvino.json").read_text(encoding="utf-8"))
    assert EvalRecord.from_json(record) == demo.evaluations["INT8, openvino"]
    assert {
        "engine",
        "precision",
        "device",
        "threads",
        "images",
        "map",
        "map50",
        "latency_ms",
        "images_per_second",
        "model_bytes",
    } <= set(record)
    assert set(record["latency_ms"]) == {"min", "p50", "p90", "p99", "max"}
    assert record["images"] == 120 and record["precision"] == "int8"
    assert record["engine"] == demo.compressed.record["evaluation"]["engine"]
    assert record["map"] == pytest.approx(demo.compressed.record["int8"]["map"], abs=1e-9)


def test_what_is_saved_computes_what_was_evaluated_in_training(demo) -> None:
    """The best candidate is selected by its agreement with the float model on training images."""
    reader = demo.reader()
    judge = Judge("openvino", "openvino", "CPU", "")
    feeds = held_out_feeds(config_of(demo), reader, demo.fp32)
    models = ((demo.fp32, "fp32"), (demo.compressed.model, "int8"))
    change = detection_change(*(judge.detect(model, precision, reader, feeds).rows for model, precision in models))
    assert 0 < change < 0.3
    evaluations = [entry["agreement"] for entry in demo.compressed.record["training"]["evaluations"]]
    assert max(evaluations) == pytest.approx(1 - change, abs=0.01)


def test_every_way_of_running_it_detects_as_well(demo) -> None:
    """Paddle's oneDNN applies scales of square matmul weights along the wrong axis, unless these are transposed."""
    scores = {label: record.map for label, record in demo.evaluations.items()}
    assert len(scores) == 3
    with contextlib.closing(create_engine("paddle_onednn", demo.compressed.model, "int8")) as engine:
        scores["oneDNN"] = evaluate(engine, demo.reader(), progress=False).map
    assert max(scores.values()) - min(scores.values()) <= 0.01, scores


def test_square_matmul_weights_have_their_scales_along_axis_0(demo) -> None:
    with static_mode():
        graph = StaticGraph.load(demo.compressed.model)
        block = graph.program.global_block()
        producer = {name: op for op in block.ops for name in op.output_arg_names}
        axes = {}
        for op in block.ops:
            dequantize = producer.get(op.input("Y")[0]) if op.type == "matmul_v2" else None
            name = dequantize.input("X")[0] if dequantize is not None else ""
            if graph.is_parameter(name):
                rows, columns = graph.parameter(name).shape
                axes.setdefault(rows == columns, set()).add((dequantize.attr("quant_axis"), op.attr("trans_y")))
    assert axes == {True: {(0, True)}, False: {(1, False)}}


def test_every_quantizable_op_is_int8_and_nothing_else_rounds(demo) -> None:
    record = demo.compressed.record
    assert record["kept_ops"] == []
    ops = ops_of(demo.compressed.model)
    assert sum(op.type in ("conv2d", "depthwise_conv2d", "matmul_v2") for op in ops) == sum(
        record["quantized_ops"].values()
    )
    readers = {name: op.type for op in ops for name in op.input_arg_names}
    for op in ops:
        if op.type == "dequantize_linear":
            assert readers[op.output("Y")[0]] in ("conv2d", "depthwise_conv2d", "matmul_v2")
        assert not (op.has_attr("only_observer") and op.attr("only_observer"))
    assert not [op.type for op in ops if "moving_average" in op.type]


def test_scales_for_tensorrt_are_kept_where_they_cannot_round(demo) -> None:
    thresholds = {
        op.type: op.attr("out_threshold") for op in ops_of(demo.compressed.model) if op.has_attr("out_threshold")
    }
    assert {"conv2d", "elementwise_add", "relu", "softmax"} <= set(thresholds)
    assert all(np.isfinite(value) and value > 0 for value in thresholds.values())


def test_attention_weights_are_stored_in_int8(demo) -> None:
    """Stock ACT leaves the four in_proj weights in float, since q, k and v are slices of them taken at run time."""
    with static_mode():
        graph = StaticGraph.load(demo.compressed.model)
        stored = {
            name: graph.parameter(name)
            for name, variable in graph.program.global_block().vars.items()
            if variable.persistable and name not in ("feed", "fetch")
        }
    large_floats = [name for name, value in stored.items() if value.dtype == np.float32 and value.ndim == 2]
    assert large_floats == []
    assert sum(value.dtype == np.int8 for value in stored.values()) > 60


def test_folding_changes_no_detection(demo, tmp_path: Path) -> None:
    with static_mode():
        graph = StaticGraph.load(demo.fp32)
        before = len(graph.program.global_block().ops)
        assert fold_constants(graph) > 0 and fold_batch_norm(graph) > 30
        types = {op.type for op in graph.program.global_block().ops}
        assert "batch_norm" not in types and len(graph.program.global_block().ops) < before
        folded = graph.save(tmp_path)
    reader = demo.reader()
    scores = []
    for model in (demo.fp32, folded):
        engine = create_engine("paddle_onednn", model, "fp32", "CPU", 2)
        scores.append(evaluate(engine, reader, limit=40, progress=False))
        engine.close()
    assert scores[1].map == pytest.approx(scores[0].map, abs=1e-3)
    assert np.abs(np.sort(scores[0].detections[:, 5]) - np.sort(scores[1].detections[:, 5])).max() < 1e-3


def test_constants_of_the_graph_are_not_trained(demo) -> None:
    from act_pipeline.compress.qat.trainable_weights import trainable_weights

    with static_mode():
        graph = StaticGraph.load(demo.fp32)
        fold_constants(graph)
        fold_batch_norm(graph)
        weights = trainable_weights(graph.program)
        constants = {
            name: graph.parameter(name).shape
            for name, variable in graph.program.global_block().vars.items()
            if variable.persistable and name not in ("feed", "fetch") and name not in weights
        }
    # Anchors, their mask and the position embedding; no weights of convolutions or matmuls.
    anchors = (224 // 8) ** 2 + (224 // 16) ** 2 + (224 // 32) ** 2
    assert {(1, anchors, 4), (1, anchors, 1), (1, 49, 128)} == set(constants.values())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_weights_are_rounded_to_the_same_integers_as_by_paddle(axis: int, shape: tuple[int, ...]) -> None:
    from paddle.static.quantization import utils

    from act_pipeline.compress.paddleslim.fast_passes import fast_passes

    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.moveaxis(weight, axis, 0)[2] = 0
    others = tuple(dimension for dimension in range(weight.ndim) if dimension != axis)
    scales = (np.abs(weight).max(others) * np.float32(0.9)).tolist()  # some weights exceed the scale
    stock = utils.quant_tensor(weight.copy(), scales, axis, 8, onnx_format=True)
    with fast_passes():
        quick = utils.quant_tensor(weight.copy(), scales, axis, 8, onnx_format=True)
        of_one = utils.quant_tensor(weight.copy(), [0.5], axis, 8, onnx_format=True)
    np.testing.assert_array_equal(quick, stock)
    np.testing.assert_array_equal(of_one, utils.quant_tensor(weight.copy(), [0.5], axis, 8, onnx_format=True))
    assert quick.dtype == stock.dtype and stock.min() == -128 and stock.max() == 127


def test_fast_passes_make_the_program_that_the_stock_passes_make(demo) -> None:
    import paddle
    from paddleslim.quant import quant_aware

    from act_pipeline.compress.paddleslim.fast_passes import fast_passes
    from act_pipeline.core.quiet import quiet_upstream

    config = {
        "onnx_format": True,
        "activation_quantize_type": "moving_average_abs_max",
        "weight_quantize_type": "channel_wise_abs_max",
        "quantize_op_types": ["conv2d", "depthwise_conv2d", "matmul_v2"],
    }

    def quantized(fast: bool) -> dict[tuple, int]:
        import contextlib

        paddle.utils.unique_name.switch()
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.scope_guard(paddle.static.Scope()), paddle.static.program_guard(main, startup):
            image = paddle.static.data("image", [-1, 3, 16, 16], "float32")
            x = paddle.nn.functional.relu(paddle.static.nn.conv2d(image, 8, 3))
            x = x + paddle.static.nn.conv2d(x, 8, 3, padding=1)
            x = paddle.static.nn.fc(x.flatten(1), 4)
            paddle.mean(paddle.matmul(x, x, transpose_y=True))
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            with fast_passes() if fast else contextlib.nullcontext():
                program = quant_aware(main, paddle.CPUPlace(), config, for_test=False, return_program=True)
        counts: dict[tuple, int] = {}
        for op in program.global_block().ops:
            signature = (op.type, tuple(sorted(op.input_arg_names)), tuple(sorted(op.output_arg_names)))
            counts[signature] = counts.get(signature, 0) + 1
        return {(kind, len(inputs), len(outputs)): count for (kind, inputs, outputs), count in counts.items()}, sorted(
            op.type for op in program.global_block().ops
        )

    with static_mode(), quiet_upstream():
        stock, fast = quantized(False), quantized(True)
    assert fast == stock and "moving_average_abs_max_scale" in stock[1] and "quantize_linear" in stock[1]


def test_quick_walks_find_the_ops_that_the_stock_ones_find(demo) -> None:
    import contextlib

    from paddleslim.core import GraphWrapper

    from act_pipeline.compress.paddleslim.patches import quick_walks
    from act_pipeline.graph.static_graph import StaticGraph

    with static_mode(), contextlib.closing(StaticGraph.load(demo.fp32)) as loaded:

        def following() -> list[list[int]]:
            graph = GraphWrapper(loaded.program)
            ops = graph.ops()
            return [[op.idx() for op in graph.next_ops(op)] for op in (*ops[::5], ops[-1])]

        stock = following()
        with quick_walks():
            assert following() == stock
    assert max(map(len, stock)) > 2 and [] in stock


def test_a_second_run_takes_what_has_not_changed(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("act_pipeline.compress.strategies.train", never)
    monkeypatch.setattr("act_pipeline.export.build_model", never)
    monkeypatch.setattr("act_pipeline.inference.evaluation.evaluate", never)
    again = run_demo(demo.root / "data", demo.root / "output", TRAINED)
    assert again.compressed.record == demo.compressed.record
    with pytest.raises(AssertionError, match="computed again"):
        run_demo(demo.root / "data", demo.root / "output", [*TRAINED, "TrainConfig.train_iter=21"])


def test_the_source_model_is_left_as_it_was(demo) -> None:
    """Stock ACT rewrites its input model."""
    record = read_record(demo.fp32.directory / "export.json", "act_pipeline.export/1")
    assert record["model_hash"] == demo.fp32.content_hash()


def config_of(demo, *overrides: str):
    return load_config(COMPRESS_CONFIG, [*TRAINED, f"Global.model_dir={demo.fp32.directory}", *overrides])


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device", "best_model"), 2)]
)
def test_a_broken_run_keeps_the_old_result_and_leaves_nothing(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    save_dir = tmp_path / "int8"
    shutil.copytree(demo.compressed.model.directory, save_dir)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr("act_pipeline.compress.strategies.train", fail)
    config = config_of(demo, "Global.Evaluation=false")
    assert run_command(lambda argv: compress(config, save_dir, reader_overrides=demo.places)) == code
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
    assert InferenceModel.load(save_dir).content_hash() == demo.compressed.model.content_hash()


@pytest.mark.parametrize(
    ("overrides", "reader_overrides", "words"),
    [
        (["Global.model_dir=nowhere"], [], "model folder nowhere does not exist"),
        (["TrainConfig.train_itre=3"], [], "train_iter"),
        (["TrainConfig.train_iter=many"], [], "train_iter"),
        (["TrainConfig.origin_metric=0.1"], [], "origin_metric"),
        (["Global.reader_config=nowhere.yml"], [], "nowhere.yml"),
        ([], ["EvalReader.sample_transforms.1.Resize.target_size=[256, 256]"], "256 x 256"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    demo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    reader_overrides: list[str],
    words: str,
) -> None:
    def command(argv):
        compress(
            config_of(demo, *overrides),
            tmp_path / "int8",
            progress=False,
            reader_overrides=[*demo.places, *reader_overrides],
        )

    assert run_command(command) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_another_class_count_is_found_before_training(demo, tmp_path: Path) -> None:
    annotations = json.loads((demo.root / "data" / "annotations" / "instances_train.json").read_text())
    annotations["categories"] = annotations["categories"][:9]
    annotations["annotations"] = [
        box
        for box in annotations["annotations"]
        if box["category_id"] in {category["id"] for category in annotations["categories"]}
    ]
    other = tmp_path / "nine.json"
    other.write_text(json.dumps(annotations))
    reader = [
        *demo.places,
        f"TrainDataset.anno_path={other}",
        f"EvalDataset.anno_path={other}",
        "EvalDataset.image_dir=images/train",
    ]
    with pytest.raises(UserError, match="9|num_classes"):
        compress(config_of(demo), tmp_path / "int8", progress=False, reader_overrides=reader)
    assert not (tmp_path / "int8").exists()


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    import paddle

    from act_pipeline.engines.device import paddle_device

    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no GPU can be used"):
        paddle_device("gpu")
    assert paddle_device("auto") == "CPU"


@pytest.mark.slow
def test_real_photographs_from_end_to_end(tmp_path: Path) -> None:
    """Blood cells: the saved INT8 model is within 0.003 mAP of FP32 after a short training."""
    model, data = SHARED / "models" / "bccd", SHARED / "data" / "bccd"
    if not model.exists():
        pytest.skip("the trained model of real photographs is not beside this repository")
    reader = ["num_classes=3", "EvalReader.sample_transforms.1.Resize.target_size=[256, 256]"]
    for name, split in (("TrainDataset", "train"), ("EvalDataset", "test"), ("TestDataset", "test")):
        reader += [
            f"{name}.dataset_dir={data}",
            f"{name}.image_dir=images",
            f"{name}.anno_path=annotations/instances_{split}.json",
        ]
    config = load_config(
        COMPRESS_CONFIG,
        [*TRAINED, f"Global.model_dir={model}", "TrainConfig.train_iter=100", "TrainConfig.eval_iter=100"],
    )
    record = compress(config, tmp_path / "int8", reader_overrides=reader).record
    assert record["fp32"]["map"] == pytest.approx(0.5466, abs=5e-4)
    assert abs(record["map_drop"]) <= 0.003 and record["bytes_ratio"] <= 0.32
