"""NMS by TensorRT's plugin, against NVIDIA's published definition of it: no test here runs TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from efficient_nms import PLUGIN, plugin_problems
from ppyoloe_fixtures import NMS, nms_model, pictures
from tensorrt_fixtures import fake_tensorrt

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines.tensorrt.module import make_log, register_plugins
from act_pipeline.families.interface import PostProcess
from act_pipeline.families.registry import Decoder, family_of_file
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower

pytest.importorskip("onnx")


def rows_model(folder: Path, *shape: int, **nms: object) -> InferenceModel:
    """Save a program whose only output has the shape of a YOLO's."""
    import paddle
    import yaml

    folder.mkdir()
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
            rows = paddle.static.data("image", [-1, *shape], "float32")
            graph = StaticGraph(program, ["image"], [], scope, paddle.static.Executor(paddle.CPUPlace()))
            graph.fetch_targets.append(paddle.add(rows, graph.add_parameter("moved", np.zeros(1, np.float32))))
            model = graph.save(folder)
    infer_cfg = {"arch": "yolo", "label_list": ["a", "b", "c"], "NMS": nms}
    (folder / "infer_cfg.yml").write_text(yaml.safe_dump(infer_cfg))
    return model


def exported(model: InferenceModel, nms: str = "tensorrt") -> tuple[onnx.ModelProto, dict[str, object]]:
    """Return the file and the attributes of its plugin."""
    proto = onnx.load(lower(model, model.directory / "model.onnx", "tensorrt", nms=nms).path)
    nodes = [node for node in proto.graph.node if node.op_type == PLUGIN]
    return proto, {
        item.name: onnx.helper.get_attribute_value(item) for node in nodes for item in node.attribute
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"score_threshold": pytest.approx(0.3), "max_output_boxes": 20}),
        ({"score_threshold": -1.0}, {"score_threshold": 0}),  # keeps all: TensorRT refuses a negative one
        (
            {"nms_threshold": 0.0},
            {"iou_threshold": pytest.approx(1.175e-38, rel=0.1, abs=0)},
        ),  # any overlap: it refuses 0
        ({"background_label": 1}, {"background_class": 1}),
        ({"keep_top_k": 250}, {"max_output_boxes": 250}),  # of 100 boxes with 3 classes
        ({"keep_top_k": -1}, {"max_output_boxes": 300}),
    ],
    ids=str,
)
def test_the_node_is_the_published_plugin(tmp_path: Path, changes: dict, expected: dict) -> None:
    proto, attributes = exported(nms_model(tmp_path / "model", 100, 3, **{**NMS, **changes}))
    assert plugin_problems(proto) == []
    assert {name: attributes[name] for name in expected} == expected


@pytest.mark.parametrize(("shape", "most"), [((7, 900), 2700), ((900, 8), 2700), ((9000, 8), 5000)])
def test_the_node_of_a_yolo(tmp_path: Path, shape: tuple[int, int], most: int) -> None:
    proto, attributes = exported(rows_model(tmp_path / "model", *shape, keep_top_k=-1, background_label=0))
    assert plugin_problems(proto) == []
    assert attributes["max_output_boxes"] == most and attributes["background_class"] == 0


@pytest.mark.parametrize("shape", [(7, 90), (90, 8)])
def test_a_background_class_of_a_yolo_in_onnx(tmp_path: Path, shape: tuple[int, int]) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = rows_model(tmp_path / "model", *shape, background_label=1, score_threshold=0.1)
    file = lower(model, tmp_path / "model.onnx", nms="onnx").path
    rows = np.random.default_rng(0).uniform(0.2, 60, (1, 90, 8)).astype(np.float32)
    rows[..., 4:] /= 60
    output = rows if shape[1] == 8 else rows[..., [0, 1, 2, 3, 5, 6, 7]].transpose(0, 2, 1)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    bbox, _ = session.run(None, {"image": np.ascontiguousarray(output)})
    assert set(bbox[:, 0]) == {0, 2}


def without(node: onnx.NodeProto, name: str) -> None:
    node.attribute.remove(next(item for item in node.attribute if item.name == name))


def with_value(node: onnx.NodeProto, name: str, value: object) -> None:
    without(node, name)
    node.attribute.append(onnx.helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda node: without(node, "box_coding"), "box_coding is missing"),
        (lambda node: with_value(node, "score_threshold", 1), "score_threshold is 1 of type 2"),
        (lambda node: with_value(node, "iou_threshold", 0.0), "iou_threshold is 0.0"),
        (lambda node: with_value(node, "max_output_boxes", 21), "expected ['N', 21, 4]"),
        (lambda node: with_value(node, "plugin_version", "2"), "plugin_version is b'2'"),
        (lambda node: node.input.reverse(), "boxes ['N', 100, 3]"),
        (lambda node: node.input.__setitem__(1, "scores"), "of scores ['N', 3, 100]"),
    ],
)
def test_the_check_finds_what_tensorrt_refuses(tmp_path: Path, change, expected: str) -> None:
    proto, _ = exported(nms_model(tmp_path / "model", 100, 3, **NMS))
    change(next(node for node in proto.graph.node if node.op_type == PLUGIN))
    assert expected in "; ".join(plugin_problems(proto))


def test_places_without_a_detection_are_left_out() -> None:
    """With a score threshold below 0.007 the plugin counts them, with the score -32768."""
    outputs = {
        "num_dets": np.array([[3], [3]], np.int32),
        "det_boxes": np.tile(np.array([1, 2, 30, 20], np.float32), (2, 3, 1)),
        "det_scores": np.array([[0.9, 0.002, -32768], [-32768] * 3], np.float32),
        "det_classes": np.array([[2, 0, 1], [1, 1, 0]], np.int32),
    }
    family = family_of_file("nms_on_original")
    assert family is not None
    found = Decoder(family, PostProcess(), Path("model.onnx"))(outputs, pictures(2))
    assert found["bbox_num"].tolist() == [2, 0]
    assert found["bbox"][:, :2].tolist() == [[2, pytest.approx(0.9)], [0, pytest.approx(0.002)]]


def test_nvidias_plugins_are_registered_before_parsing_and_loading(int8_model, tmp_path: Path) -> None:
    """Without it the parser answers "Plugin not found", and the runtime does not load the engine."""
    from tensorrt_fixtures import fake_cuda

    from act_pipeline.engines.tensorrt.engine import TensorRTEngine

    events = []
    trt = fake_tensorrt()
    trt.module.init_libnvinfer_plugins = lambda log, namespace: events.append(f"plugins of {namespace!r}")
    parse, load = trt.module.OnnxParser, trt.module._load
    trt.module.OnnxParser = lambda *arguments: events.append("parse") or parse(*arguments)
    trt.module._load = lambda plan: events.append("load") or load(plan)
    import shutil

    shutil.copytree(int8_model.directory, tmp_path / "model")
    engine = TensorRTEngine(InferenceModel.load(tmp_path / "model"), "int8", "GPU", cuda=fake_cuda(), tensorrt=trt)
    engine.close()
    assert events[0] == "plugins of ''" and events.index("parse") > 0 and "load" in events
    rtx = fake_tensorrt("1.7.1", "tensorrt_rtx")
    register_plugins(rtx.module, make_log(rtx.module))  # has none
