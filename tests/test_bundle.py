"""`act-pipeline bundle`: what is in a bundle, and its scripts on a machine without Paddle."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_fixtures import DEVICE, STEPS, described, export_raw_model, load_script, on_device, tar_names, unpack
from inference_fixtures import CLASS_NAMES, export_tiny_model, make_tiny_data, write_reader

from act_pipeline.bundle import BundleRequest, make_bundle
from act_pipeline.bundle.spelling import spell_for
from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import machine
from act_pipeline.engines.tensorrt.targets import TARGETS, VERSIONS

BASE = [
    "README.md",
    "bundle.json",
    "expected.json",
    "infer_cfg.yml",
    "model.onnx",
    "preprocess.py",
    "run.py",
    "verify.py",
]
WITH_ENGINE = ["build.py", "build.sh", "tensorrt_runtime.py"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_tiny_data(tmp_path / "data").parent


def request(tmp_path: Path, model: InferenceModel, target: str, data: Path, **options) -> BundleRequest:
    reader = write_reader(tmp_path / "reader.yml", data)
    given = {"reader_config": str(reader), "output": str(tmp_path / f"{target}.tar"), **options}
    return BundleRequest(str(model.directory), target, **given)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_of_every_target_is_whole_and_spelled_for_it(tmp_path, int8_model, float_model, data, target) -> None:
    device = TARGETS[target]
    model = described(int8_model if device.int8 else float_model, tmp_path / "model")
    made = make_bundle(request(tmp_path, model, target, data))
    folder = unpack(made.path, tmp_path / "there")
    there = json.loads((folder / "bundle.json").read_text())
    pictures = [f"pictures/{number}.png" for number in (1, 2, 3)]
    extra = ["model.bin", "model.xml"] if target == "cpu" else WITH_ENGINE
    names = [name.partition("/")[2] for name in tar_names(made.path)]
    assert sorted(names) == sorted([*BASE, *extra, "pictures", *pictures])
    assert there["precision"] == ("int8" if device.int8 else "fp32") and there["classes"] == list(CLASS_NAMES)
    assert there["preprocess"] == STEPS
    expected = json.loads((folder / "expected.json").read_text())["pictures"]
    assert [entry["file"] for entry in expected] == pictures
    assert all(entry["detections"][0][1] > 0.3 for entry in expected)
    proto = onnx.load(str(folder / "model.onnx"))
    zero_points = {tensor.data_type for tensor in proto.graph.initializer if tensor.data_type in (2, 3)}
    if device.int8:  # uint8 activations on a CPU, int8 alone for NVIDIA's parsers
        assert (onnx.TensorProto.UINT8 in zero_points) == (target == "cpu")
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    version = device.version()
    assert halves == (version is not None and version.typed)
    if version is not None:
        assert proto.opset_import[0].version <= version.opset
        script = (folder / "build.sh").read_text()
        assert subprocess.run(["sh", "-n", str(folder / "build.sh")], check=False).returncode == 0
        assert (device.jetpack.get(version.name) or "JetPack") in script or not device.jetpack
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    assert batch == (there["batch"] if there["fixed_batch"] else 0)
    assert bool(there["profile"]) == (not there["fixed_batch"] and version is not None)
    assert str(tmp_path) not in (folder / "bundle.json").read_text()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_run_and_verify_on_a_machine_without_paddle(tmp_path, int8_model, data, runtime) -> None:
    pytest.importorskip(runtime)
    model = described(int8_model, tmp_path / "model")
    folder = unpack(make_bundle(request(tmp_path, model, "cpu", data)).path, tmp_path / "there")
    absent = on_device(folder, "verify.py", "--runtime", runtime, absent=("numpy",))
    assert absent.returncode == 1 and "numpy" in absent.stderr  # the stand-in for an empty environment works
    ended = on_device(
        folder,
        "verify.py",
        "--runtime",
        runtime,
        "--coco",
        str(data / "annotations.json"),
        "--images",
        str(data / "images"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " agrees: 1.000 of the boxes matched" in ended.stdout
    assert "mAP 1.0000 on 5 pictures" in ended.stdout
    result = tmp_path / "found.json"
    ended = on_device(
        folder, "run.py", "--runtime", runtime, "--batch", "2", "--json", str(result), "--draw", str(tmp_path / "drawn"),
        "--repeat", "2",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "disc " in ended.stdout and "pictures a second" in ended.stdout
    assert [len(entry["detections"]) for entry in json.loads(result.read_text())] == [1, 1, 1]
    assert len(list((tmp_path / "drawn").iterdir())) == 3
    ended = on_device(folder, "run.py", "--repeat", "-3")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "--repeat is -3, expected at least 0, which is no timing" in ended.stderr


def test_each_runtime_of_a_cpu_bundle_gets_the_form_that_it_computes_in_int8(tmp_path, data) -> None:
    runtime = pytest.importorskip("onnxruntime")
    tiny = export_tiny_model(tmp_path / "tiny", quantized=True, observed=25.0)
    model = described(tiny, tmp_path / "model")
    folder = unpack(make_bundle(request(tmp_path, model, "cpu", data)).path, tmp_path / "there")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "QLinearConv" in kinds and not {"Conv", "FusedConv"}.intersection(kinds)
    assert '"FakeQuantize"' in (folder / "model.xml").read_text()
    rows = {}
    for name in ("onnxruntime", "openvino"):
        ended = on_device(folder, "run.py", "--runtime", name, "--json", str(tmp_path / "found.json"))
        assert ended.returncode == 0, ended.stderr
        assert ("model.onnx" if name == "onnxruntime" else "model.xml") in ended.stdout.splitlines()[0]
        rows[name] = [entry["detections"] for entry in json.loads((tmp_path / "found.json").read_text())]
    assert [len(found) for found in rows["openvino"]] == [1, 1, 1]
    np.testing.assert_allclose(rows["onnxruntime"], rows["openvino"], atol=0.005)
    assert "`model.xml` with its `.bin` | the model for OpenVINO" in (folder / "README.md").read_text()


def test_verify_finds_a_machine_that_detects_something_else(tmp_path, int8_model, data) -> None:
    model = described(int8_model, tmp_path / "model")
    folder = unpack(make_bundle(request(tmp_path, model, "cpu", data)).path, tmp_path / "there")
    expected = json.loads((folder / "expected.json").read_text())
    for entry in expected["pictures"]:
        for row in entry["detections"]:
            row[2:] = [value + 9 for value in row[2:]]
    (folder / "expected.json").write_text(json.dumps(expected))
    ended = on_device(folder, "verify.py")
    assert ended.returncode == 1 and "DOES NOT AGREE" in ended.stdout, ended.stderr


@pytest.mark.parametrize("family", ["yolo", "detr_raw"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_raw_outputs_become_the_same_detections_as_in_the_product(tmp_path, data, family, runtime) -> None:
    pytest.importorskip(runtime)
    nms = {"score_threshold": 0.05, "nms_threshold": 0.3, "keep_top_k": 100}
    raw = export_raw_model(tmp_path / "raw", family)
    model = described(raw, tmp_path / "model", arch=family, NMS=nms)
    made = make_bundle(request(tmp_path, model, "cpu", data))
    folder = unpack(made.path, tmp_path / "there")
    ended = on_device(folder, "verify.py", "--runtime", runtime, "--min_matched", "1", "--min_iou", "0.9999")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    boxes = [len(entry["detections"]) for entry in json.loads((folder / "expected.json").read_text())["pictures"]]
    assert min(boxes) > 3, "nothing to compare"


def test_nms_is_the_plugin_where_tensorrt_has_it(tmp_path, data) -> None:
    model = described(export_raw_model(tmp_path / "raw", "yolo"), tmp_path / "model", arch="yolo")
    for target, op in (("nano", "EfficientNMS_TRT"), ("t4", "EfficientNMS_TRT"), ("rtx", "NonMaxSuppression")):
        folder = unpack(make_bundle(request(tmp_path, model, target, data)).path, tmp_path / "there")
        ops = {node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node}
        assert op in ops, (target, ops)
        assert json.loads((folder / "bundle.json").read_text())["family"] == "nms_on_input"


def test_a_video_is_counted_in_frames_a_second(tmp_path, int8_model, data) -> None:
    import cv2

    model = described(int8_model, tmp_path / "model")
    folder = unpack(make_bundle(request(tmp_path, model, "cpu", data)).path, tmp_path / "there")
    video = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(6):
        video.write(np.full((48, 64, 3), 200, np.uint8))
    video.release()
    ended = on_device(folder, "run.py", "--video", str(tmp_path / "v.avi"), "--frames", "5")
    assert ended.returncode == 0 and "5 frames in all" in ended.stdout and "FPS" in ended.stdout, ended.stderr
    ended = on_device(folder, "run.py", "--video", str(tmp_path / "none.avi"))
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith("error: OpenCV cannot open")
    ended = on_device(folder, "run.py", "--runtime", "tensorrt")
    assert ended.returncode == 2 and "run ./build.sh on this machine first" in ended.stderr
    ended = on_device(folder, "run.py", str(tmp_path / "none.png"))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "none.png" in ended.stderr


def test_the_same_model_gives_the_same_bytes(tmp_path, int8_model, data) -> None:
    model = described(int8_model, tmp_path / "model")
    first, second = (make_bundle(request(tmp_path, model, "t4", data)).path.read_bytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("target", "options", "changes", "message"),
    [
        ("orinn", {}, {}, "--target is 'orinn', expected one of t4, a10, .*did you mean 'orin'"),
        ("nano", {}, {}, "has no INT8; give the float model's folder"),
        ("xavier", {"tensorrt": "10"}, {}, "--tensorrt is '10', but Jetson Xavier has 8.5"),
        ("cpu", {"tensorrt": "10"}, {}, "cpu has no TensorRT"),
        ("t4", {"output": "x.zip"}, {}, "expected a file name that ends in .tar"),
        ("t4", {"batch": 0}, {}, "--batch is 0"),
        ("t4", {"float_model_path": "x"}, {}, "--float_model_path=x is for a deep learning accelerator"),
        ("t4", {"reader_config": None, "pictures": ("x.jpg",)}, {"Preprocess": None}, "has no Preprocess"),
        ("t4", {"reader_config": None, "pictures": ("x.jpg",)}, {}, "x.jpg"),
        (
            "t4",
            {"reader_config": None, "pictures": ("x.jpg",)},
            {"Preprocess": [*STEPS[:2], {"type": "Gt2YoloTarget"}, STEPS[2]]},
            "the preprocessing of .* is Resize, NormalizeImage, Gt2YoloTarget, Permute",
        ),
    ],
)
def test_what_cannot_be_bundled_is_said_in_one_line(
    tmp_path, int8_model, data, target, options, changes, message
) -> None:
    model = described(int8_model, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message) as refused:
        make_bundle(request(tmp_path, model, target, data, **options))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.tar"))


def test_pictures_without_an_object_are_no_proof(tmp_path, data) -> None:
    nms = {"score_threshold": 0.999, "nms_threshold": 0.5}
    model = described(export_raw_model(tmp_path / "raw", "yolo"), tmp_path / "model", arch="yolo", NMS=nms)
    with pytest.raises(UserError, match="detects nothing with a score of 0.3 in 5 pictures"):
        make_bundle(request(tmp_path, model, "cpu", data))


def layer_norm_model(path: Path, opset: int = 17) -> onnx.ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], axis=-1, epsilon=1e-4, name="n"),
        helper.make_node("LayerNormalization", ["y", "s2"], ["z"], axis=1, name="m"),
    ]
    constants = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("s", [5]), ("b", [5]), ("s2", [4, 5]))
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 5])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4, 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(proto.SerializeToString())
    return proto


@pytest.mark.parametrize("version", ["8.2", "8.5"])
def test_layer_norm_is_written_out_for_parsers_without_it(tmp_path, version) -> None:
    from onnx.reference import ReferenceEvaluator

    before = layer_norm_model(tmp_path / "m.onnx")
    spell_for(tmp_path / "m.onnx", VERSIONS[version], "m")
    after = onnx.load(str(tmp_path / "m.onnx"))
    ops = {node.op_type for node in after.graph.node}
    assert "LayerNormalization" not in ops and after.opset_import[0].version == min(17, VERSIONS[version].opset)
    x = np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)
    found, wanted = (ReferenceEvaluator(proto).run(None, {"x": x})[0] for proto in (after, before))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    layer_norm_model(tmp_path / "new.onnx")
    spell_for(tmp_path / "new.onnx", VERSIONS["8.6"], "m")
    assert "LayerNormalization" in {node.op_type for node in onnx.load(str(tmp_path / "new.onnx")).graph.node}


def test_an_op_that_a_parser_lacks_is_named(tmp_path) -> None:
    from onnx import TensorProto, helper

    nodes = [helper.make_node("GridSample", ["x", "g"], ["y"])]
    described_as = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2]) for name in ("x", "y")]
    grid = helper.make_tensor_value_info("g", TensorProto.FLOAT, [1, 2, 2, 2])
    graph = helper.make_graph(nodes, "g", [described_as[0], grid], described_as[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="m has GridSample, which the ONNX parser of TensorRT 8.2 does not know"):
        spell_for(tmp_path / "m.onnx", VERSIONS["8.2"], "m")
    spell_for(tmp_path / "m.onnx", VERSIONS["8.5"], "m")


@pytest.mark.parametrize(("module", "package"), [("google", "protobuf"), ("paddle", "paddlepaddle")])
def test_a_package_that_is_missing_here_is_one_line(tmp_path, int8_model, module, package) -> None:
    model, script = described(int8_model, tmp_path / "model"), DEVICE.parents[2] / "deploy" / "bundle.py"
    flags = [f"--model_path={model.directory}", "--target=t4", f"--output={tmp_path / 't4.tar'}"]
    ended = on_device(tmp_path / "there", str(script), *flags, absent=(module,))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: the package {package} is missing (") and ended.stderr.count("\n") == 1
    assert "requirements/cpu.txt" in ended.stderr


def test_a_missing_runtime_is_told_before_the_export(tmp_path, int8_model, data, monkeypatch) -> None:
    here = dataclasses.replace(machine(), packages={})
    monkeypatch.setattr("act_pipeline.engines.registry.machine", lambda: here)
    said: list[str] = []
    with pytest.raises(UserError, match="openvino and onnx are not installed; .*-r requirements/openvino.txt"):
        make_bundle(request(tmp_path, described(int8_model, tmp_path / "model"), "t4", data), said.append)
    assert not said


def test_nano_is_told_a_smaller_input_and_why_fp16(tmp_path, data, capsys) -> None:
    model = described(export_raw_model(tmp_path / "raw", "yolo"), tmp_path / "model", arch="yolo")
    reader = write_reader(tmp_path / "reader.yml", data)
    arguments = [
        "bundle",
        f"--model_path={model.directory}",
        f"--reader_config={reader}",
        f"--output={tmp_path / 'n.tar'}",
    ]
    assert main([*arguments, "--target=nano"]) == 0
    told = capsys.readouterr().out
    assert "has no INT8: the bundle computes in FP16" in told and "one stream" in told and "is advised" not in told
    from act_pipeline.bundle.make import _advice

    (_, advice) = _advice(TARGETS["nano"], (640, 640), None)
    assert "at most 416 x 416 is advised, 2.4 times less work" in advice


@pytest.mark.slow
def test_the_bundle_of_the_sample_agrees_in_onnx_runtime_and_openvino(tmp_path, demo) -> None:
    pytest.importorskip("onnxruntime")
    images = sorted((demo.root / "data" / "images" / "val").iterdir())[:3]
    output = str(tmp_path / "sample.tar")
    model = demo.compressed.model
    made = make_bundle(BundleRequest(str(model.directory), "cpu", output, pictures=tuple(map(str, images))))
    folder = unpack(made.path, tmp_path / "there")
    for runtime in ("openvino", "onnxruntime"):
        ended = on_device(folder, "verify.py", "--runtime", runtime)
        assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["t4", "orin", "xavier", "rtx"])
def test_the_int8_form_of_each_target_detects_as_the_sample_does(tmp_path, demo, target) -> None:
    """ONNX Runtime computes what TensorRT is given; TensorRT-RTX builds it."""
    pytest.importorskip("onnxruntime")
    images = sorted((demo.root / "data" / "images" / "val").iterdir())[:3]
    pair = {"float_model_path": str(demo.fp32.directory)} if TARGETS[target].dla else {}
    output = str(tmp_path / f"{target}.tar")
    request = BundleRequest(
        str(demo.compressed.model.directory), target, output, pictures=tuple(map(str, images)), **pair
    )
    folder = unpack(make_bundle(request).path, tmp_path / "there")
    ended = on_device(folder, "verify.py", "--runtime", "onnxruntime")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if pair:
        ended = on_device(folder, "verify.py", "--runtime", "onnxruntime", "--model", str(folder / "model_dla.onnx"))
        assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_bundle_without_a_gpu(tmp_path, demo) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    images = sorted((demo.root / "data" / "images" / "val").iterdir())[:3]
    output = str(tmp_path / "rtx.tar")
    model = demo.compressed.model
    make_bundle(BundleRequest(str(model.directory), "rtx", output, pictures=tuple(map(str, images))))
    folder = unpack(tmp_path / "rtx.tar", tmp_path / "there")
    ended = on_device(folder, "build.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (folder / "model.plan").stat().st_size > 1_000_000


def test_the_package_has_what_is_copied() -> None:
    assert {path.name for path in DEVICE.glob("*.py")} >= {*WITH_ENGINE, "run.py", "verify.py", "preprocess.py"} - {
        "build.sh"
    }
    assert load_script("run").HERE == str(DEVICE)
    assert sys.version_info >= (3, 9)
