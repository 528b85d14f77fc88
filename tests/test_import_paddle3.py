"""Models of Paddle 3: inference.yml, the environment with Paddle 3, its process, and (slow) real models."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from paddle3_fixtures import CONVERTS, INFERENCE_YML, fake_python, model_folder
from sample_fixtures import scenes_in

from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import READER_CONFIG, SCENE_SIZE
from act_pipeline.evaluation import EVAL_SCHEMA
from act_pipeline.families.registry import decoder_of
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.verify import compare
from act_pipeline.importers.paddle3 import environment, import_paddle3
from act_pipeline.importers.paddle3.environment import environment_directory, find_paddle3, make_environment
from act_pipeline.importers.paddle3.folder import Paddle3Folder, translate_description
from act_pipeline.inference import InferenceRequest, run_inference

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

ROOT = Path(__file__).resolve().parents[1]
PTQ_CONFIG = ROOT / "configs" / "sample_ptq.yml"
TRANSFORM_OPS = """
PreProcess:
  transform_ops:
  - DecodeImage: {img_mode: RGB, channel_first: false}
  - ResizeImage: {size: [256, 320], interpolation: BICUBIC}
  - NormalizeImage: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], scale: 1./255., order: ''}
  - ToCHWImage: null
  - KeepKeys: {keep_keys: [image]}
PostProcess:
  Detection:
    label_list: [cat, dog]
"""


# Folders


def test_files_are_found_by_folder_and_by_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for given in (folder, folder / "inference.json"):
        found = Paddle3Folder.find(given)
        assert found.program == folder / "inference.json" and found.parameters == folder / "inference.pdiparams"
        assert found.description == folder / "inference.yml"
    (folder / "inference.json").rename(folder / "rtdetr.json")
    (folder / "inference.pdiparams").rename(folder / "rtdetr.pdiparams")
    (folder / "inference.yml").rename(folder / "infer_cfg.yml")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    found = Paddle3Folder.find(folder)
    assert (found.program.name, found.description.name) == ("rtdetr.json", "infer_cfg.yml")


def _without_parameters(folder: Path) -> None:
    (folder / "inference.pdiparams").unlink()


def _with_empty_parameters(folder: Path) -> None:
    (folder / "inference.pdiparams").write_bytes(b"")


def _of_paddle2(folder: Path) -> None:
    (folder / "inference.json").rename(folder / "inference.pdmodel")


def _with_two(folder: Path) -> None:
    (folder / "model.json").write_bytes((folder / "inference.json").read_bytes())


def _of_something_else(folder: Path) -> None:
    (folder / "inference.json").write_text('{"model": 1}', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_parameters, r"inference\.pdiparams is missing"),
        (_with_empty_parameters, r"inference\.pdiparams is empty"),
        (_of_paddle2, r"a model of Paddle 2 .*Global\.model_dir"),
        (_with_two, r"2 programs of Paddle 3 \(model\.json, inference\.json\)"),
        (_of_something_else, r"inference\.json is no program of Paddle 3"),
    ],
)
def test_a_folder_that_is_none_is_told(tmp_path: Path, damage: Any, message: str) -> None:
    folder = model_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message):
        import_paddle3(folder, tmp_path / "out", python="/nonexistent")
    with pytest.raises(UserError, match="does not exist"):
        Paddle3Folder.find(tmp_path / "nothing")


# inference.yml


def test_preprocess_is_taken_as_it_is() -> None:
    content = yaml.safe_load(INFERENCE_YML)
    found = translate_description(content, "inference.yml")
    assert found["Preprocess"] == content["Preprocess"]
    assert (found["arch"], found["label_list"], found["min_subgraph_size"]) == ("DETR", ["disc", "square"], 3)
    assert "Global" not in found
    content["Preprocess"][0]["target_size"] = 32
    assert translate_description(content, "inference.yml")["Preprocess"][0]["target_size"] == [32, 32]


def test_transform_ops_are_translated() -> None:
    found = translate_description(yaml.safe_load(TRANSFORM_OPS), "inference.yml")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert found["Preprocess"] == [
        {"type": "Resize", "target_size": [256, 320], "keep_ratio": False, "interp": 2},
        {"type": "NormalizeImage", "mean": mean, "std": std, "is_scale": True, "norm_type": "mean_std"},
        {"type": "Permute"},
    ]
    assert found["label_list"] == ["cat", "dog"]


@pytest.mark.parametrize("scale", [1.0, "1", "1.0 / 1", 0.00392157, "1/255", "1./255."])
def test_scales(scale: Any) -> None:
    steps = [{"NormalizeImage": {"mean": [0, 0, 0], "std": [1, 1, 1], "scale": scale}}]
    found = translate_description({"PreProcess": {"transform_ops": steps}}, "inference.yml")
    assert found["Preprocess"][0]["is_scale"] == ("255" in str(scale) or scale == 0.00392157)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Preprocess": {"Resize": 1}}, "'Preprocess' is no list"),
        ({"PreProcess": {"transform_ops": [1]}}, r"transform_ops' is no list"),
        (
            {"PreProcess": {"transform_ops": [{"CropImage": {"size": 1}}]}},
            r"transform_ops\[0\] \(CropImage\) is not known",
        ),
        ({"PreProcess": {"transform_ops": [{"DecodeImage": {"img_mode": "BGR"}}]}}, "img_mode is 'BGR', expected RGB"),
        ({"PreProcess": {"transform_ops": [{"ResizeImage": {"resize_short": 256}}]}}, "its size is None"),
        ({"PreProcess": {"transform_ops": [{"Resize": {"size": 8, "interp": "BOX"}}]}}, "interpolation is 'BOX'"),
        ({"PreProcess": {"transform_ops": [{"NormalizeImage": {"std": [1, 1, 0]}}]}}, "no std 0"),
        ({"PreProcess": {"transform_ops": [{"NormalizeImage": {"scale": "1/0"}}]}}, "scale is '1/0'"),
        ({"PreProcess": {"transform_ops": [{"NormalizeImage": {"scale": 0.5}}]}}, "scale is 0.5"),
        ({"label_list": "cat"}, "'label_list' is no list"),
        ({"names": {0: "a", 2: "b"}}, "'names' is no list"),
    ],
)
def test_a_description_that_is_not_known_is_told(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"inference.yml: .*{message}"):
        translate_description(content, "inference.yml")


# The environment


def make_wheel(folder: Path) -> str:
    """Write wheels of packages with the names that the probe looks for; return their lock lines."""
    lines = []
    for name, version in (("paddlepaddle", "3.2.9"), ("paddle2onnx", "2.1.9")):
        info = f"{name}-{version}.dist-info"
        path = folder / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    return "".join(lines)


def test_the_environment_is_made_once_for_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "cache"))
    lock = tmp_path / "paddle3.txt"
    lock.write_text(make_wheel(tmp_path), encoding="utf-8")
    source = "import sys; from pathlib import Path; from act_pipeline.importers.paddle3 import environment as e; "
    command = [sys.executable, "-c", source + "print(e.make_environment(Path(sys.argv[1])))", str(lock)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [run.communicate(timeout=300) for run in runs]
    directory = environment_directory(lock)
    assert [run.returncode for run in runs] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(directory)} and directory.is_relative_to(tmp_path / "cache")
    errors = "".join(err for _, err in said)
    assert errors.count("installing 2 packages") == 1 and "to download" in errors
    monkeypatch.setattr(environment, "LOCK", lock)
    monkeypatch.setattr(environment, "make_environment", lambda: make_environment(lock))
    found = find_paddle3()
    assert (found.paddle, found.paddle2onnx) == ("3.2.9", "2.1.9")
    assert found.python == directory / "bin" / "python"


def test_another_lock_is_another_environment(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert environment_directory(tmp_path / "a") != environment_directory(tmp_path / "b")
    with pytest.raises(UserError, match=r"missing is missing, expected the lock .*--paddle3_python"):
        environment_directory(tmp_path / "missing")


def test_offline_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "cache"))
    installer = tmp_path / "install.py"
    installer.write_text("import sys\nprint('working')\nsys.exit('error: pip could not install it: no network')\n")
    with pytest.raises(UserError) as error:
        make_environment(environment.LOCK, installer)
    text = str(error.value)
    assert "pip could not install it: no network; offline, make one" in text and "error:" not in text
    assert f"pip install -r {environment.LOCK}" in text and "--paddle3_python paddle3/bin/python" in text


@pytest.mark.parametrize(
    ("paddle", "paddle2onnx", "message"),
    [
        ("2.6.2", "2.1.0", r"has paddlepaddle 2\.6\.2 .*expected 3\.0 to 3\.2 and 2"),
        ("3.3.1", "2.1.0", r"has paddlepaddle 3\.3\.1"),
        ("3.2.2", "1.2.11", r"paddle2onnx 1\.2\.11"),
        ("none", "none", r"has paddlepaddle none"),
    ],
)
def test_a_python_with_other_versions_is_told(tmp_path: Path, paddle: str, paddle2onnx: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_paddle3(fake_python(tmp_path, paddle=paddle, paddle2onnx=paddle2onnx))


def test_a_python_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--paddle3_python .*nothing does not run .*No such file"):
        find_paddle3(tmp_path / "nothing")
    with pytest.raises(UserError, match="does not run as a Python 3"):
        find_paddle3(Path("/bin/false"))


# The process with Paddle 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(-1)", r": the process ended with 255$"),
        ("import signal; os.kill(os.getpid(), signal.SIGSEGV)", r"the process crashed \(SIGSEGV\)$"),
        (
            "print('[ERROR] Failed to convert PaddlePaddle model: op x is not there.'); raise NameError('onnx_model_str')",
            r": op x is not there\. \(the process ended with 1\)$",
        ),
        ("raise ValueError('of two\\nlines')", r": ValueError: of two \(the process ended with 1\)$"),
        ("pass", r"wrote no file$"),
    ],
)
def test_a_process_that_fails_is_one_line(tmp_path: Path, body: str, message: str) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"inference\.json cannot be exported to ONNX.*" + message) as error:
        import_paddle3(folder, tmp_path / "out", python=fake_python(tmp_path / "fake", body))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def tiny_onnx(path: Path) -> None:
    """Write a detector of one convolution with boxes and scores, whose input size is open."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    weight = numpy_helper.from_array(rng.standard_normal((6, 3, 8, 8), np.float32), "weight")
    shape = numpy_helper.from_array(np.array([0, 6, 16], np.int64), "shape")
    nodes = [
        helper.make_node("Conv", ["x"] + ["weight"], ["map"], strides=[8, 8]),
        helper.make_node("Reshape", ["map", "shape"], ["rows"]),
        helper.make_node("Sigmoid", ["rows"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 16])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_a_model_is_imported_with_its_description(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    tiny_onnx(folder / "inference.onnx")
    python = fake_python(tmp_path / "fake", CONVERTS.replace("FACTOR", "1"))
    imported = import_paddle3(folder, tmp_path / "out", python=python)
    assert imported.inputs == {"image": (-1, 3, 32, 32)}, "the size is that of Resize"
    assert imported.paddle3_difference < 1e-5 and "to Paddle 3: " in imported.summary()
    cfg = InferenceModel.load(tmp_path / "out").infer_cfg()
    assert cfg == translate_description(yaml.safe_load(INFERENCE_YML), "")
    record = read_record(tmp_path / "out" / "import.json", "act_pipeline.import/1")
    assert record["source"] == "inference.json" and record["versions"]["paddlepaddle3"] == "3.2.2"
    assert import_paddle3(folder, tmp_path / "out", python=python).model.directory == tmp_path / "out", "replaced"


def test_results_that_are_not_those_of_paddle3_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    tiny_onnx(folder / "inference.onnx")
    python = fake_python(tmp_path / "fake", CONVERTS.replace("FACTOR", "1.01"))
    with pytest.raises(UserError, match=r"inference\.json: what was imported differs from Paddle 3\.2\.2 by .*e-0"):
        import_paddle3(folder, tmp_path / "out", python=python)
    assert not (tmp_path / "out").exists()


def test_each_image_of_an_open_batch_has_its_own_boxes(tmp_path: Path) -> None:
    """The post-process of a DETR as paddle2onnx writes it: indices with the image's number, and ``bbox_num``."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(2)
    arrays = {
        "weight": rng.standard_normal((6, 3, 8, 8), np.float32),
        "shape": np.array([0, 6, 16], np.int64),
        "one": np.array([1], np.int64),
        "five": np.array([5], np.int64),
        "column": np.zeros((1, 5, 1), np.int64),
        "rows": np.array([-1, 6], np.int64),
        "last": np.array([2], np.int64),
        "count": np.array([5], np.int32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["map"], strides=[8, 8]),
        helper.make_node("Reshape", ["map", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", ["tokens"], ["score"], axes=[2], keepdims=0),
        helper.make_node("TopK", ["score", "five"], ["best", "index"], axis=1),
        helper.make_node("Unsqueeze", ["index", "last"], ["index3"]),
        helper.make_node("Concat", ["column", "index3"], ["where"], axis=2),
        helper.make_node("GatherND", ["tokens", "where"], ["boxes"]),
        helper.make_node("Reshape", ["boxes", "rows"], ["bbox"]),
        helper.make_node("Tile", ["count", "one"], ["bbox_num"]),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 32, 32])]
    outputs = [
        helper.make_tensor_value_info("bbox", TensorProto.FLOAT, ["k", 6]),
        helper.make_tensor_value_info("bbox_num", TensorProto.INT32, ["n"]),
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    (tmp_path / "detr.onnx").write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    imported = import_onnx(tmp_path / "detr.onnx", tmp_path / "out")
    assert imported.fixed_batch == "" and imported.inputs["image"] == (-1, 3, 32, 32)
    assert [shape for _, shape in imported.outputs] == [(-1, 6), (-1,)]


def test_boxes_of_equal_scores_may_stand_in_another_order() -> None:
    rng = np.random.default_rng(3)
    boxes, counts = rng.random((7, 6)) * 100, np.array([3, 4], np.int32)
    order = [1, 0, 2, 6, 5, 4, 3]
    assert compare([boxes, counts], [boxes[order] + 1e-6, counts]) < 1e-5
    assert compare([boxes, counts], [boxes[[3, 1, 2, 0, 4, 5, 6]], counts]) > 1e-2, "another image's"
    assert compare([boxes, counts], [boxes[order], counts[::-1]]) > 1e-2


# Real models of Paddle 3


@pytest.fixture(scope="module")
def paddle3() -> Path:
    """The Python of the environment with Paddle 3, in the user's cache, as the command makes it."""
    try:
        return find_paddle3().python
    except UserError as error:
        pytest.skip(f"no environment with Paddle 3: {error}")


def written_by_paddle3(python: Path, *arguments: str) -> Path:
    """Run paddle3_models.py; return the folder that it wrote."""
    script = Path(__file__).with_name("paddle3_models.py")
    done = subprocess.run([python, "-I", script, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Path(arguments[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), [("yolo", "yolo"), ("detr", "rtdetr")])
def test_a_small_network_of_paddle3(paddle3: Path, tmp_path: Path, kind: str, family: str) -> None:
    folder = written_by_paddle3(paddle3, kind, str(tmp_path / kind))
    imported = import_paddle3(folder, tmp_path / "float")
    assert imported.paddle3_difference < 1e-4
    shapes = inspect_model(imported.model).output_shapes
    assert decoder_of(imported.model, shapes).family.name == family
    assert "image" in imported.inputs and imported.model.infer_cfg_path.is_file()


@pytest.mark.slow
def test_the_trained_sample_in_paddle3_is_imported_and_compressed(
    paddle3: Path, sample_model: InferenceModel, tmp_path: Path
) -> None:
    """The sample's RT-DETR, with its post-process, as a model of Paddle 3: the same mAP, and INT8 that keeps it."""
    make_sample(tmp_path / "data", 24, 24, seed=0, size=SCENE_SIZE)
    reader = scenes_in(tmp_path / "data")
    folder = written_by_paddle3(paddle3, "translate", str(sample_model.directory), str(tmp_path / "paddle3"))
    shutil.copy(sample_model.infer_cfg_path, folder / "inference.yml")
    imported = import_paddle3(folder, tmp_path / "float", images=tmp_path / "data" / "images" / "val")
    assert imported.paddle3_difference < 1e-4
    assert imported.model.infer_cfg()["Preprocess"] == sample_model.infer_cfg()["Preprocess"]

    overrides = [f"Global.model_dir={imported.model.directory}", "QuantPost.calib_images=24"]
    compressed = compress(load_config(PTQ_CONFIG, overrides), tmp_path / "int8", reader_overrides=reader)
    json_file = tmp_path / "eval.json"
    request = InferenceRequest(str(sample_model.directory), device="CPU", engine="openvino", json=str(json_file))
    run_inference(request, reader=Reader.load(READER_CONFIG, reader), say=lambda line: None)
    expected = read_record(json_file, EVAL_SCHEMA)["stats"]["ap"]
    fp32, int8 = (compressed.record[name]["map"] for name in ("fp32", "int8"))
    assert expected > 0.3 and fp32 == pytest.approx(expected, abs=1e-3)
    assert int8 > fp32 - 0.03
    assert compressed.record["agreement"]["matched"] > 0.95
