"""PP-YOLOE: from PaddleDetection's config to an INT8 file, with and without its NMS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from efficient_nms import plugin_problems
from ppyoloe_fixtures import (
    CLASSES,
    NMS,
    SIZE,
    exported,
    nms_model,
    pictures,
    ppyoloe_config,
    write_act_config,
    write_scenes,
)

from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.records import read_record
from act_pipeline.engines import create_engine
from act_pipeline.export import export_model
from act_pipeline.families.interface import PostProcess
from act_pipeline.families.registry import Decoder, decoder_for, decoder_of, family_of_file, find_family
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower

VARIANTS = {"exclude_nms": "exclude_nms=True", "rows": "exclude_post_process=True"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """A PP-YOLOE+ with its NMS in the graph."""
    return exported(tmp_path_factory.mktemp("ppyoloe"), ppyoloe_config())


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """The same weights, exported up to boxes and scores, or up to one array of both."""
    return exported(tmp_path_factory.mktemp(request.param), ppyoloe_config(), VARIANTS[request.param])


def detections(engine: str, model: InferenceModel | OnnxModel, precision: str = "fp32") -> list[np.ndarray]:
    """Return the rows [K, 6] of each of three pictures, by class and descending score."""
    running = create_engine(engine, model, precision, "CPU", 1, batch_size=3)
    found = running.run(pictures(3))
    running.close()
    return by_image(found["bbox"], found["bbox_num"])


def by_image(bbox: np.ndarray, bbox_num: np.ndarray) -> list[np.ndarray]:
    images = np.split(bbox.reshape(-1, 6), np.cumsum(bbox_num)[:-1])
    return [rows[np.lexsort((rows[:, 3], rows[:, 2], -rows[:, 1].round(4), rows[:, 0]))] for rows in images]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], pixels: float = 0.02) -> None:
    assert [len(rows) for rows in ours] == [len(rows) for rows in theirs]
    for one, other in zip(ours, theirs):
        np.testing.assert_array_equal(one[:, 0], other[:, 0])
        np.testing.assert_allclose(one[:, 1], other[:, 1], atol=1e-4)
        np.testing.assert_allclose(one[:, 2:], other[:, 2:], atol=pixels)


# --- the export ------------------------------------------------------------------------------------------------------


def test_the_model_and_its_description_are_paddledetections(model: InferenceModel) -> None:
    summary = inspect_model(model)
    assert dict(summary.inputs) == {"image": (-1, 3, SIZE, SIZE), "scale_factor": (-1, 2)}
    assert list(summary.output_shapes.values()) == [(-1, 6), (-1,)]
    described = model.infer_cfg()
    assert (described["mode"], described["metric"], described["use_dynamic_shape"]) == ("paddle", "COCO", False)
    assert described["arch"] == "YOLO" and described["min_subgraph_size"] == 3
    assert described["NMS"] == ppyoloe_config()["PPYOLOEHead"]["nms"]
    assert [step["type"] for step in described["Preprocess"]] == ["Resize", "NormalizeImage", "Permute"]
    assert described["Preprocess"][0]["target_size"] == [SIZE, SIZE]
    assert described["label_list"] == [f"class_{index}" for index in range(CLASSES)]


def test_the_graph_computes_what_ppdets_model_does(model: InferenceModel) -> None:
    import paddle

    from act_pipeline.rtdetr.build import build_model

    folder = model.directory.parents[1]
    network = build_model(str(folder / "model.yml"), weights=str(folder / "model_final.pdparams"))
    network.eval()
    with paddle.no_grad():
        found = network({name: paddle.to_tensor(array) for name, array in pictures(3).items()})
    theirs = by_image(found["bbox"].numpy(), found["bbox_num"].numpy())
    assert min(len(rows) for rows in theirs) > 5
    assert_same(detections("paddle", model), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "override", "arch", "outputs"),
    [
        ("PPYOLOE", "trt=True", "PPYOLOE", [(-1, 6), (-1,)]),
        ("PPYOLOEWithAuxHead", "exclude_nms=True", "PPYOLOE", [(-1, 84, 4), (-1, CLASSES, 84)]),
        ("YOLOv3", "TestReader.inputs_def.image_shape=[3,96,64]", "YOLO", [(-1, 6), (-1,)]),
    ],
)
def test_architectures_and_options(
    tmp_path: Path, architecture: str, override: str, arch: str, outputs: list[tuple[int, ...]]
) -> None:
    found = exported(tmp_path, ppyoloe_config(architecture), override)
    assert found.infer_cfg()["arch"] == arch
    assert list(inspect_model(found).output_shapes.values()) == outputs
    if "image_shape" not in override:
        assert_same(detections("onnxruntime", found), detections("paddle", found))
    else:
        assert inspect_model(found).input_size == (96, 64)


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**ppyoloe_config(), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architecture": "FasterRCNN", "FasterRCNN": {"backbone": "ResNet"}},
            "FasterRCNN with these parts cannot be exported here, expected DETR with RTDETRTransformer, or YOLOv3",
        ),
        ({"YOLOv3": {"yolo_head": "YOLOv3Head"}}, "YOLOv3 with these parts cannot be exported here"),
        ({"PPYOLOEHead": {"nms": {"name": "MatrixNMS"}}}, "'PPYOLOEHead.nms' is 'MatrixNMS', expected MultiClassNMS"),
        ({"PPYOLOEHead": [1]}, "'PPYOLOEHead' is \\[1\\], expected 'key: value' lines"),
        ({"TestReader": {"inputs_def": {}}}, "TestReader.sample_transforms is missing"),
        ({"exclude_nms": "sometimes"}, "'exclude_nms' is 'sometimes', expected True or False"),
        ({"num_classes": 5}, "they are of 3 classes, num_classes is 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_exported_is_one_line(model: InferenceModel, tmp_path: Path, changes: dict, words: str) -> None:
    config = write(tmp_path / "model.yml", **changes)
    weights = model.directory.parents[1] / "model_final.pdparams"
    with pytest.raises(UserError, match=words) as raised:
        export_model(config, tmp_path, [f"weights={weights}"])
    assert "\n" not in str(raised.value)


# --- NMS in the graph, and cut out of it -----------------------------------------------------------------------------


def test_without_nms_in_the_file_the_engines_detect_as_paddle(model: InferenceModel) -> None:
    theirs = detections("paddle", model)
    for engine in ("onnxruntime", "openvino"):
        assert_same(detections(engine, model), theirs)
    file = next((model.directory / "onnx").glob("*.onnx"))
    proto = onnx.load(file)
    assert [output.name for output in proto.graph.output] == ["boxes", "scores"]
    record = read_record(file.with_suffix(".json"), "act_pipeline.onnx/1")
    assert record["detections"]["family"] == "ppyoloe"
    post = record["detections"]["post"]
    assert (post["score_threshold"], post["nms_threshold"], post["nms_top_k"], post["keep_top_k"]) == (0.2, 0.6, 40, 25)
    assert post["clip"] is False  # the operator does not clip


def test_the_file_alone_is_enough(model: InferenceModel, tmp_path: Path) -> None:
    """The thresholds are in the file: a copy without its record and its model's description detects the same."""
    (tmp_path / "first").mkdir()
    lowered = lower(model, tmp_path / "first" / "model.onnx")
    copy = tmp_path / "second.onnx"
    copy.write_bytes(lowered.path.read_bytes())
    assert_same(detections("onnxruntime", OnnxModel(copy)), detections("paddle", model))


def test_nms_in_the_file_detects_as_paddle(model: InferenceModel, tmp_path: Path) -> None:
    lowered = lower(model, tmp_path / "model.onnx", nms="onnx")
    proto = onnx.load(lowered.path)
    assert [output.name for output in proto.graph.output] == ["bbox", "bbox_num"]
    assert "NonMaxSuppression" in {node.op_type for node in proto.graph.node}
    theirs = detections("paddle", model)
    for engine in ("onnxruntime", "openvino"):
        assert_same(detections(engine, OnnxModel(lowered.path)), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_nms_is_appended_to_models_without_it(variant: InferenceModel, tmp_path: Path) -> None:
    assert decoder_of(variant, inspect_model(variant).output_shapes).family.name == "ppyoloe"
    theirs = detections("paddle", variant)
    assert sum(map(len, theirs)) > 10
    lowered = lower(variant, tmp_path / "model.onnx", nms="onnx")
    for artifact in (variant, OnnxModel(lowered.path)):
        for engine in ("onnxruntime", "openvino"):
            assert_same(detections(engine, artifact), theirs)


@pytest.mark.slow
def test_all_stages_of_the_post_process_give_the_same_boxes(tmp_path: Path, model: InferenceModel) -> None:
    """Only clipping differs: Paddle's operator leaves boxes over the edge."""
    whole = detections("paddle", model)
    for rows in whole:
        rows[:, 2:] = np.clip(rows[:, 2:], 0, [SIZE / 0.4, SIZE / 0.5] * 2)
    whole = [by_image(rows, np.array([len(rows)]))[0] for rows in whole]
    for name, override in VARIANTS.items():
        found = exported(tmp_path / name, ppyoloe_config(), override)
        assert_same(detections("paddle", found), whole)


@pytest.mark.parametrize("float16", [False, True])
def test_tensorrts_plugin_is_well_formed(model: InferenceModel, tmp_path: Path, float16: bool) -> None:
    lowered = lower(model, tmp_path / "model.onnx", "tensorrt", nms="tensorrt", float16=float16)
    proto = onnx.load(lowered.path)
    onnx.checker.check_model(proto, full_check=True)
    assert plugin_problems(proto) == []
    (node,) = (node for node in proto.graph.node if node.op_type == "EfficientNMS_TRT")
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert attributes == {
        "plugin_version": b"1", "score_threshold": pytest.approx(0.2), "iou_threshold": pytest.approx(0.6),
        "max_output_boxes": 25, "background_class": -1, "score_activation": 0, "class_agnostic": 0, "box_coding": 0,
    }  # fmt: skip
    shapes = {
        output.name: [size.dim_value or size.dim_param for size in output.type.tensor_type.shape.dim]
        for output in proto.graph.output
    }
    assert shapes == {
        "num_dets": ["N", 1], "det_boxes": ["N", 25, 4], "det_scores": ["N", 25], "det_classes": ["N", 25],
    }  # fmt: skip
    by_name = {output: made for made in proto.graph.node for output in made.output}
    assert by_name[node.input[1]].op_type == "Transpose"  # scores are [N, A, C]
    assert lowered.detections is not None and lowered.detections["family"] == "nms_on_original"


@pytest.mark.parametrize("on_input", [True, False])
def test_the_plugins_outputs_become_detections(on_input: bool) -> None:
    outputs = {
        "num_dets": np.array([[1], [2]], np.int32),
        "det_boxes": np.array([[[2, 4, 20, 30], [9, 9, 9, 9]], [[0, 0, 10, 10], [-4, 5, 90, 30]]], np.float32),
        "det_scores": np.array([[0.9, 0.1], [0.8, 0.7]], np.float32),
        "det_classes": np.array([[2, 0], [1, 0]], np.int32),
    }
    family = family_of_file("nms_on_input" if on_input else "nms_on_original")
    assert family is not None
    found = Decoder(family, PostProcess(), Path("model.onnx"))(outputs, pictures(2))
    assert found["bbox_num"].tolist() == [1, 2]
    scale = np.array([0.4, 0.5, 0.4, 0.5]) if on_input else np.ones(4)
    edge = [160, 60] if on_input else [90, 30]
    expected = [[2, 4, 20, 30], [0, 0, 10, 10]] / scale
    np.testing.assert_allclose(found["bbox"][:2, 2:], expected, rtol=1e-6)
    np.testing.assert_allclose(found["bbox"][2, 2:], [0, 10 if on_input else 5, *edge], rtol=1e-6)
    np.testing.assert_allclose(found["bbox"][:, :2], [[2, 0.9], [1, 0.8], [0, 0.7]], rtol=1e-6)


def test_nms_is_not_appended_to_what_ends_with_detections(float_model: InferenceModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--nms onnx appends NMS to models that end before it .families ppyoloe and"):
        lower(float_model, tmp_path / "model.onnx", nms="onnx")
    from act_pipeline.cli import onnx as command

    arguments = ["--model_path", str(float_model.directory), "--output", str(tmp_path / "model.onnx")]
    assert run_command(command.main, [*arguments, "--nms", "plugin"]) == 2


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nms_top_k": -1, "keep_top_k": -1},
        {"background_label": 1},
        {"normalized": False, "nms_threshold": 0.3},
        {"score_threshold": 0.99999},  # nothing is found
        {"nms_eta": 1.1, "keep_top_k": 3},  # PaddleDetection's trt=True
    ],
    ids=str,
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_nms_is_paddles_operator(tmp_path: Path, changes: dict, runtime: str) -> None:
    model = nms_model(tmp_path / "model", 100, 3, **{**NMS, **changes})
    rng = np.random.default_rng(4)
    corner = rng.uniform(0, 60, (4, 100, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 40, (4, 100, 2))], axis=2).astype(np.float32)
    scores = rng.permutation(1200).reshape(4, 3, 100).astype(np.float32) / 1200
    scores[2] = 0  # an image without detections
    with static_mode():
        import paddle

        graph = StaticGraph.load(model)
        feed = {"image": boxes, "scores": scores}
        with paddle.static.scope_guard(graph.scope):
            bbox, count = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
    file = lower(model, tmp_path / "model.onnx", nms="onnx").path
    ours = run_onnx(runtime, file, {"image": boxes, "scores": scores})
    assert ours[1].tolist() == count.tolist() and (count[0] > 0) == (changes.get("score_threshold") is None)
    assert_same(by_image(*ours), by_image(bbox if count.any() else np.zeros((0, 6)), count), pixels=1e-4)
    descending = [np.diff(rows[:, 1]) <= 0 for rows in np.split(ours[0], np.cumsum(ours[1])[:-1]) if len(rows)]
    assert all(step.all() for step in descending)


def run_onnx(runtime: str, file: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the outputs of a file in another program's way: without this package's engines."""
    if runtime == "onnxruntime":
        import onnxruntime

        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed)
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feed)
    return [
        np.array(found[output]).reshape((-1, 6) if index == 0 else -1) for index, output in enumerate(compiled.outputs)
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nms_eta": 0.9}, "its nms_eta is 0.9, expected 1"),
        ({"beside": True}, "op multiclass_nms3 .* the program has outputs that are not behind it"),
    ],
)
def test_nms_that_cannot_be_cut_is_one_line(tmp_path: Path, changes: dict, words: str) -> None:
    model = nms_model(tmp_path / "model", 100, 3, **{**NMS, **changes})
    with pytest.raises(UserError, match=words) as raised:
        lower(model, tmp_path / "model.onnx")
    assert "\n" not in str(raised.value)


# --- families and ACT's configs --------------------------------------------------------------------------------------


def test_rows_of_both_are_ppyoloes_where_arch_says_so() -> None:
    shapes = {"output": (-1, 84, 7)}
    for arch in ("PPYOLOE", "YOLO", "ppyoloe"):
        assert find_family(shapes, Path("model"), arch).name == "ppyoloe"
    assert find_family(shapes, Path("model")).name == "yolo"
    rows = np.zeros((1, 42, 6), np.float32)
    rows[0, 0] = [10, 20, 30, 60, 0.9, 0.1]
    rows[0, 1] = [11, 20, 30, 60, 0.8, 0.1]  # overlaps the first
    rows[0, 2] = [40, 40, 80, 60, 0.1, 0.7]  # over the edge
    decoder = Decoder(find_family({"output": (1, 42, 6)}, Path("model"), "PPYOLOE"), PostProcess(0.3), Path("model"))
    found = decoder({"output": rows}, pictures(1))
    expected = [[0, 0.9, 25, 40, 75, 120], [1, 0.7, 100, 80, 160, 120]]
    np.testing.assert_allclose(found["bbox"], expected, rtol=1e-6)
    # The same from boxes in pixels of the original image.
    family = find_family({"boxes": (1, 42, 4), "scores": (1, 2, 42)}, Path("model"))
    apart = {"boxes": rows[..., :4] / [0.4, 0.5, 0.4, 0.5], "scores": rows[..., 4:].transpose(0, 2, 1)}
    np.testing.assert_allclose(Decoder(family, PostProcess(0.3), Path("m"))(apart, pictures(1))["bbox"], found["bbox"])


def test_paddleslims_arch_takes_a_graph_with_nms(model: InferenceModel, tmp_path: Path) -> None:
    """PaddleSlim's ppyoloe_l_qat_dis.yaml: arch: PPYOLOE, include_nms: True."""
    config = load_config(write_act_config(tmp_path, model, tmp_path / "reader.yml", include_nms=True))
    assert config.global_.arch == "PPYOLOE" and config.global_.include_nms
    assert decoder_for(config, model).family.name == "rtdetr"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ptq", "qat_dis"])
@pytest.mark.parametrize("include_nms", [True, False])
def test_paddleslims_config_compresses(model: InferenceModel, tmp_path: Path, include_nms: bool, strategy: str) -> None:
    from act_pipeline.compress import compress

    if not include_nms:
        model = exported(tmp_path / "model", ppyoloe_config(), "exclude_nms=True")
    reader = write_scenes(tmp_path / "data", model)
    config = load_config(
        write_act_config(tmp_path, model, reader, include_nms), [f"Strategy.name={strategy}", "Strategy.max_drop=0.1"]
    )
    compressed = compress(config, tmp_path / "int8", device="CPU", progress=False)
    record = json.loads((compressed.model.directory / "act.json").read_text())
    # The annotations are its detections, clipped to the picture, which NMS in the graph leaves out.
    assert record["fp32"]["map"] > (0.2 if include_nms else 0.99)
    assert record["int8"]["map"] > record["fp32"]["map"] - 0.2
    assert record["quantized_ops"]["conv2d"] > 50
    # The deployed file detects as the INT8 model does in Paddle's arithmetic.
    lowered = lower(compressed.model, tmp_path / "int8.onnx", nms="onnx")
    theirs = detections("onnxruntime", compressed.model, "int8")
    assert_same(detections("onnxruntime", OnnxModel(lowered.path), "int8"), theirs, pixels=1e-3)
