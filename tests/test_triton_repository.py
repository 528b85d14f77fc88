"""Repositories for Triton: configs by Triton's own definitions, and the ensemble run as they say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from bundle_fixtures import described, export_raw_model, odd_pictures, run_build
from inference_fixtures import CLASS_NAMES, export_tiny_model, make_tiny_data, write_reader
from triton_fixtures import RECORDED, Refusal, Server, as_json, configs_of, data_type, model_config_class

from act_pipeline.bundle.description import device_steps
from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine
from act_pipeline.triton import RepositoryRequest, make_repository
from act_pipeline.triton.pbtxt import Word, entries, text_of

NMS = {"score_threshold": 0.05, "nms_threshold": 0.3, "keep_top_k": 100}
PARTS = ("preprocess", "detector", "postprocess")


@pytest.fixture(scope="module")
def models(float_model, int8_model, tmp_path_factory) -> dict[str, InferenceModel]:
    folder = tmp_path_factory.mktemp("described")
    made = {"int8": described(int8_model, folder / "int8"), "float": described(float_model, folder / "float")}
    tiny = export_tiny_model(folder / "tiny", quantized=True, observed=25.0)
    made["observed"] = described(tiny, folder / "observed")
    for family in ("yolo", "detr_raw"):
        raw = export_raw_model(folder / f"{family}_raw", family)
        made[family] = described(raw, folder / family, arch=family, NMS=NMS)
    return made


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    return write_reader(folder / "reader.yml", make_tiny_data(folder / "data").parent)


@pytest.fixture
def make(models, reader, tmp_path):
    def made(model: str, **options) -> Path:
        given = {"reader_config": str(reader), "output": str(tmp_path / "repository"), **options}
        return make_repository(RepositoryRequest(str(models[model].directory), **given)).path

    return made


def check_maps(configs: dict, name: str) -> None:
    """Check an ensemble as Triton does when it loads one: every tensor is made once, with the type and sizes it is read with."""
    ensemble = configs[name]
    made = {value.name: (data_type(value), list(value.dims)) for value in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = configs[step.model_name]
        assert config.max_batch_size == ensemble.max_batch_size
        inputs, outputs = ({value.name: value for value in values} for values in (config.input, config.output))
        assert set(step.input_map) == set(inputs) and set(step.output_map) <= set(outputs)
        for own, tensor in step.input_map.items():
            assert made[tensor] == (data_type(inputs[own]), list(inputs[own].dims)), (step.model_name, own)
        for own, tensor in step.output_map.items():
            assert tensor not in made, tensor
            made[tensor] = data_type(outputs[own]), list(outputs[own].dims)
    for value in ensemble.output:
        assert made[value.name] == (data_type(value), list(value.dims))


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [
        ("int8", {}, 1),
        ("int8", {"backend": "openvino", "max_batch": 4, "instances": 2}, 4),
        ("yolo", {"backend": "onnxruntime", "queue_delay_us": 500}, 8),
        ("int8", {"target": "t4"}, 8),
        ("yolo", {"target": "a10", "tensorrt": "8.6", "max_batch": 2}, 2),
        ("int8", {"target": "orin"}, 0),
    ],
)
def test_configs_are_what_triton_defines_and_fit_the_model(make, name, options, batch) -> None:
    folder = make(name, **options)
    configs = configs_of(folder)
    assert set(configs) == {"detect", *(f"detect_{part}" for part in PARTS)}
    check_maps(configs, "detect")
    detector = configs["detect_detector"]
    gpu = options.get("target") is not None
    assert detector.backend == options.get("backend", "tensorrt" if gpu else "openvino")
    assert detector.max_batch_size == batch and all((folder / model / "1").is_dir() for model in configs)
    file = folder / "model.onnx" if gpu else folder / "detect_detector" / "1" / detector.default_model_filename
    assert file.is_file() and (detector.default_model_filename == "model.plan") == gpu
    if file.suffix == ".onnx":
        graph = onnx.load(str(file)).graph
        for values, stated in ((graph.input, detector.input), (graph.output, detector.output)):
            assert [value.name for value in values] == [value.name for value in stated]
            for value, config in zip(values, stated):
                sizes = [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim]
                wanted = sizes[1:] if batch else sizes
                assert all(want in (-1, size) for want, size in zip(wanted, config.dims)), (value.name, config.dims)
                kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
                assert data_type(config) == f"TYPE_{kind.replace('FLOAT', 'FP32')}"
    groups = {
        group.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[group.kind].name
        for group in detector.instance_group
    }
    assert groups == {"KIND_GPU" if gpu else "KIND_CPU"} and detector.instance_group[0].count == options.get(
        "instances", 1
    )
    batching = detector.dynamic_batching
    assert list(batching.preferred_batch_size) == ([batch] if batch > 1 else [])
    if batch > 1:
        assert batching.max_queue_delay_microseconds == options.get("queue_delay_us", 2000)
    assert [warm.batch_size for warm in detector.model_warmup] == sorted({1, max(batch, 1)})
    for warm in detector.model_warmup:
        assert set(warm.inputs) == {value.name for value in detector.input}
        for own, value in warm.inputs.items():
            if value.input_data_file:
                size = 4 * int(np.prod(value.dims))
                assert (folder / "detect_detector" / "warmup" / value.input_data_file).stat().st_size == size, own
    assert all(config.version_policy.latest.num_versions == 1 for config in configs.values())
    assert (folder / "build.sh").exists() == gpu and (folder / "config.json").exists() == (
        detector.backend == "openvino"
    )
    assert "detect_detector" in (folder / "README.md").read_text() and "{" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {}),
        ("int8", {"backend": "onnxruntime"}),
        ("yolo", {"backend": "onnxruntime"}),
        ("yolo", {"max_batch": 4}),
        ("detr_raw", {"max_batch": 4}),
    ],
)
def test_the_ensemble_detects_what_the_package_does(make, models, reader, tmp_path, monkeypatch, name, options) -> None:
    server = Server(make(name, min_score=0.05, **options), monkeypatch)
    random = np.random.default_rng(0)
    files = []
    for number, size in enumerate([(40, 60), (64, 64), (90, 33)]):
        files.append(tmp_path / f"{number}.png")
        cv2.imwrite(str(files[-1]), (random.random((*size, 3)) * (255, 128, 20)[number]).astype(np.uint8))
    fitted = Reader.load(reader)
    engine = create_engine("openvino", models[name], "int8" if name == "int8" else "fp32")
    wanted = [engine.run(fitted.preprocess(path))["bbox"] for path in files]
    engine.close()
    wanted = [rows[rows[:, 1] >= 0.05] for rows in wanted]
    most = server.configs["detect"].max_batch_size
    counts = []
    for first in range(0, len(files), most):
        chunk = np.array([[path.read_bytes()] for path in files[first : first + most]], object)
        found = server.run("detect", {"picture": chunk})
        for place, expected in enumerate(wanted[first : first + most]):
            count = int(found["count"][place, 0])
            counts.append(count)
            assert count == len(expected)
            rows = np.column_stack([found["labels"][place], found["scores"][place], found["boxes"][place]])
            order = [np.lexsort(each[:count, ::-1].T.round(3)) for each in (rows, expected)]
            np.testing.assert_allclose(rows[:count][order[0]], expected[order[1]], atol=2e-3)
            assert (found["labels"][place][count:] == -1).all() and (found["scores"][place][count:] == 0).all()
    assert max(counts) > 0 and (name == "int8" or len(set(counts)) > 1), (
        "the pictures have different numbers of objects"
    )


def test_the_onnxruntime_backend_computes_its_convolutions_in_int8(make, monkeypatch, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    folder = make("observed", backend="onnxruntime")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = folder / "detect_detector" / "1" / "model.onnx"
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "QLinearConv" in kinds and not {"Conv", "FusedConv"}.intersection(kinds)
    picture = cv2.imencode(".png", np.full((20, 30, 3), 200, np.uint8))[1].tobytes()
    batch = np.array([[picture]], object)
    found = Server(folder, monkeypatch).run("detect", {"picture": batch})
    wanted = Server(make("observed", backend="openvino"), monkeypatch).run("detect", {"picture": batch})
    assert found["count"].tolist() == wanted["count"].tolist() == [[1]]
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_allclose(found[name], wanted[name], atol=0.005, err_msg=name)


def test_a_fixed_batch_runs_with_explicit_sizes(make, monkeypatch) -> None:
    """The ONNX file that a Jetson's engine is built from, run in ONNX Runtime."""
    folder = make("int8", target="orin")
    config = folder / "detect_detector" / "config.pbtxt"
    text = config.read_text().replace('"tensorrt"', '"onnxruntime"').replace("model.plan", "model.onnx")
    config.write_text(text.replace("KIND_GPU", "KIND_CPU"))
    (folder / "model.onnx").rename(folder / "detect_detector" / "1" / "model.onnx")
    server = Server(folder, monkeypatch)
    content = cv2.imencode(".png", np.full((20, 30, 3), 255, np.uint8))[1].tobytes()
    found = server.run("detect", {"picture": np.array([[content]], object)})
    assert found["count"].tolist() == [[1]] and found["boxes"].shape == (1, 1, 4)


def test_the_preprocessing_model_gives_what_the_reader_gives(make, reader, tmp_path, monkeypatch) -> None:
    server = Server(make("float", max_batch=8), monkeypatch)
    fitted, same = Reader.load(reader), 0
    assert device_steps(fitted)[-1]["type"] == "Permute"
    for path in odd_pictures(tmp_path / "odd")[3::9]:
        try:
            wanted = fitted.preprocessing().sample(path, 0)
        except Exception:  # the reader refuses it in words of its own
            with pytest.raises(Refusal):
                server.run("detect_preprocess", {"picture": np.array([[path.read_bytes()]], object)})
            continue
        found = server.run("detect_preprocess", {"picture": np.array([[path.read_bytes()]], object)})
        for key, array in found.items():
            np.testing.assert_array_equal(array[0], np.asarray(wanted[key], np.float32), err_msg=f"{path} {key}")
        same += 1
    assert same >= 6


def test_a_bad_picture_fails_its_own_request_alone(make, monkeypatch) -> None:
    server = Server(make("float", max_batch=8), monkeypatch)
    good = cv2.imencode(".png", np.full((20, 30, 3), 200, np.uint8))[1].tobytes()
    for bad, words in (
        (b"", "no picture"),
        (b"text", "no picture"),
        (good[:40], "no picture"),
        (b"x" * (33 << 20), "at most"),
    ):
        with pytest.raises(Refusal, match=words) as refused:
            server.run("detect", {"picture": np.array([[good], [bad]], object)})
        assert "picture 1" in str(refused.value) and "\n" not in str(refused.value)
    assert server.run("detect", {"picture": np.array([[good]], object)})["count"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "int8",
            {"backend": "onnxrt"},
            "--backend is 'onnxrt', expected one of onnxruntime, openvino, tensorrt.*did you",
        ),
        ("int8", {"backend": "tensorrt"}, "--backend=tensorrt contradicts --target=cpu, expected --target=one of t4"),
        (
            "int8",
            {"backend": "openvino", "target": "t4"},
            "--backend=openvino contradicts --target=t4, expected --target=cpu",
        ),
        ("int8", {"target": "rtx"}, "but Triton has no backend for TensorRT-RTX, expected one of cpu, t4, a10"),
        ("float", {"target": "nano"}, "but Jetson Nano or TX2 is too small"),
        ("int8", {"target": "t4", "tensorrt": "9"}, "--tensorrt is '9', but NVIDIA T4 has 10, 11, 8.6, 8.5"),
        ("int8", {"tensorrt": "10"}, "cpu has no TensorRT"),
        ("int8", {"name": "../x"}, "--name is '../x', expected letters"),
        ("int8", {"min_score": 1.5}, "--min_score is 1.5, expected 0 to 1"),
        ("int8", {"max_batch": 0}, "--max_batch is 0, expected at least 1"),
        ("int8", {"reader_config": "none.yml"}, "none.yml does not exist"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(make, tmp_path, name, options, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        make(name, **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "repository").exists()


def test_an_output_of_something_else_stays_and_an_own_one_is_replaced(make, models, tmp_path, capsys) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "mine.txt").write_text("mine")
    command = ["triton-repository", f"--model_path={models['int8'].directory}", f"--output={tmp_path / 'repository'}"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holds mine.txt and no repository.json" in said
    (tmp_path / "repository" / "mine.txt").unlink()
    assert main(command) == 0 and main([*command, "--name=cells"]) == 0
    assert "ensemble cells" in capsys.readouterr().out and not (tmp_path / "repository" / "detect").exists()
    assert main(["triton-repository", f"--model_path={tmp_path}", "--output=x"]) == 2
    assert "model.pdmodel is missing" in capsys.readouterr().err


def test_texts_of_users_survive_the_text_format() -> None:
    from google.protobuf import text_format

    names = ['a"b', "c\\d", "zwölf\n", "猫", "tab\t", "it's"]
    text = text_of({"name": "x", "parameters": entries({"classes": json.dumps(names)}, "string_value"),
                    "instance_group": [{"kind": Word("KIND_CPU"), "count": 2}], "default_model_filename": names[2]})  # fmt: skip
    config = text_format.Parse(text, model_config_class()())
    assert json.loads(config.parameters["classes"].string_value) == names
    assert config.default_model_filename == names[2] and as_json(config)["instance_group"] == [
        {"kind": "KIND_CPU", "count": 2}
    ]
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text_of({"nme": "x"}), model_config_class()())


def test_the_config_of_openvino_s_server_has_its_keys(make) -> None:
    folder = make("int8", instances=2)
    content = json.loads((folder / "config.json").read_text())
    (entry,) = content.pop("model_config_list")
    assert not content and set(entry) == {"config"}
    known = set((RECORDED / "ovms_model_config.txt").read_text().split())
    assert {"name", "base_path"} <= set(entry["config"]) <= known
    inside = folder / Path(entry["config"]["base_path"]).relative_to("/models")
    assert [path.name for path in inside.iterdir() if path.name.isdigit()] == ["1"]
    assert (inside / "1" / "model.xml").is_file() and (inside / "1" / "model.bin").is_file()


def test_build_sh_builds_the_engine_where_triton_looks_for_it(make, tmp_path) -> None:
    folder = make("int8", target="t4", max_batch=4)
    ended = run_build(tmp_path / "there", (folder / "build.sh").read_text(), "TensorRT v101303")
    assert ended.returncode == 0, ended.stderr
    called = (tmp_path / "there" / "called").read_text()
    assert called.startswith("--onnx=model.onnx --saveEngine=detect_detector/1/model.plan --stronglyTyped")
    assert "--maxShapes=" in called and "image:4x3x32x32" in called
    assert os.access(folder / "build.sh", os.X_OK) and "build.py" not in (folder / "build.sh").read_text()
    assert subprocess.run(["sh", "-n", str(folder / "build.sh")], check=False).returncode == 0


def test_classes_are_told(make) -> None:
    config = configs_of(make("int8"))["detect"]
    assert json.loads(config.parameters["classes"].string_value) == list(CLASS_NAMES)


def test_the_recorded_definitions_are_those_of_tritonclient() -> None:
    pytest.importorskip("grpc", reason="grpcio, which the lock has for Python 3.10 and later")
    definitions = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    known = {field.name for field in model_config_class().DESCRIPTOR.fields}
    assert known <= {field.name for field in definitions.ModelConfig.DESCRIPTOR.fields}
