"""The flags, and all ways from a request to scores, an image, or a TensorRT engine with collected shapes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from inference_fixtures import (
    GPU_MACHINE,
    SHARED,
    SIZE,
    RecordingInference,
    TinyReader,
    export_tiny_model,
    make_tiny_data,
    write_reader,
)

from act_pipeline.cli.eval import parse_bool, parse_request
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.records import read_record
from act_pipeline.engines.paddle.dynamic_shape import RECORD_FILENAME, SHAPES_FILENAME
from act_pipeline.evaluation import EVAL_SCHEMA
from act_pipeline.inference import InferenceRequest, run_inference
from act_pipeline.inference.shapes import COLLECTED_VARIABLE

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = REPOSITORY / "deploy" / "infer_eval.py"
BCCD_FIRST_TWELVE = 0.53287  # mAP of ../shared/models/bccd on the first twelve test images, in Paddle Inference


@pytest.fixture()
def model_path(int8_model, tmp_path) -> Path:
    return Path(shutil.copytree(int8_model.directory, tmp_path / "model"))


@pytest.fixture()
def reader(tmp_path) -> TinyReader:
    annotations = make_tiny_data(tmp_path / "data", images=3)
    return TinyReader(annotations, annotations.parent / "images")


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "yes", "on", " True "])
def test_true(text):
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no", "off"])
def test_false(text):
    assert parse_bool(text) is False


@pytest.mark.parametrize("text", ["", "2", "None", "maybe"])
def test_neither(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bool(text)


def test_paddleslims_command_line_is_understood():
    request = parse_request(
        [
            "--model_path=models/int8",
            "--reader_config=r.yml",
            "--image_file",
            "a.jpg",
            "--device=gpu",
            "--use_trt",
            "True",
            "--precision=INT8",
            "--use_dynamic_shape=False",
            "--use_mkldnn=False",
            "--cpu_threads=10",
            "--benchmark=True",
            "--include_nms=True",
            "--trt_calib_mode=False",
            "--img_shape=640",
            "--model_filename=m.pdmodel",
            "--params_filename=m.pdiparams",
        ]
    )
    assert request == InferenceRequest(
        model_path="models/int8",
        reader_config="r.yml",
        image_file="a.jpg",
        device="GPU",
        use_trt=True,
        precision="int8",
        use_dynamic_shape=False,
        cpu_threads=10,
        benchmark=True,
        img_shape=(640, 640),
        model_filename="m.pdmodel",
        params_filename="m.pdiparams",
    )


def test_flags_alone_are_true_and_nothing_given_is_the_defaults():
    assert parse_request(["--use_trt", "--collect_shape_only"]) == InferenceRequest(
        use_trt=True, collect_shape_only=True
    )
    assert parse_request([]) == InferenceRequest()
    assert parse_request(["--img_shape=480,640"]).img_shape == (480, 640)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--use_trt=maybe", "--use_trt: found 'maybe', expected True or False"),
        ("--precision=int9", "--precision: found 'int9', expected one of fp32, fp16, bf16, int8; did you mean 'int8'"),
        (
            "--engine=openvno",
            "--engine: found 'openvno', expected one of auto, all, paddle, paddle_onednn, int8_reference, ",
        ),
        ("--engine=openvno", "did you mean 'openvino'"),
        ("--device=XPU", "--device: found 'XPU', expected CPU, GPU or auto"),
        ("--img_shape=big", "--img_shape: found 'big', expected a size"),
        ("--batch_size=0", "--batch_size: found '0', expected a whole number of at least 1"),
        ("--threshold=2", "--threshold: found '2', expected a number from 0 to 1"),
        ("--presicion=int8", "unknown flag '--presicion=int8'; did you mean '--precision'"),
        ("--model_path", "--model_path: expected one argument"),
    ],
)
def test_flags_that_are_wrong_are_one_line(flag, message):
    with pytest.raises(UserError) as caught:
        parse_request([flag])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_request(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(InferenceRequest))


# --- on the CPU ------------------------------------------------------------------------------------------------------


def request_for(model_path, **more) -> InferenceRequest:
    return InferenceRequest(model_path=str(model_path), device="CPU", cpu_threads=1, **more)


def quiet(line: str) -> None:
    """Ignore a message."""


def test_evaluating_prints_the_twelve_lines_and_writes_the_record(model_path, reader, tmp_path):
    said = []
    request = request_for(model_path, json=str(tmp_path / "out" / "eval.json"), batch_size=2)
    outcome = run_inference(request, reader=reader, say=said.append)
    assert outcome.exit_code == 0 and outcome.evaluation.map == 1.0
    assert sum("Average" in line for line in outcome.lines) == 12
    record = read_record(tmp_path / "out" / "eval.json", EVAL_SCHEMA)
    assert (record["engine"], record["precision"], record["device"], record["threads"]) == ("paddle", "int8", "CPU", 1)
    assert record["map"] == 1.0 and record["images"] == 3 and record["batch_size"] == 2
    assert record["model_bytes"] == InferenceModel.load(model_path).bytes
    assert record["versions"]["paddlepaddle"].startswith("2.6")
    assert any("every Q/DQ in float" in line for line in said)


def test_onednn_is_asked_for_by_flag(float_model, reader):
    outcome = run_inference(request_for(float_model.directory, use_mkldnn=True, limit=2), reader=reader, say=quiet)
    assert outcome.record["engine"] == "paddle_onednn" and outcome.record["precision"] == "fp32"
    assert outcome.record["images"] == 2


def test_benchmark_times_only(float_model, reader, tmp_path):
    request = request_for(float_model.directory, benchmark=True, batch_size=2, json=str(tmp_path / "b.json"))
    outcome = run_inference(request, reader=reader, say=quiet)
    assert outcome.lines[0].startswith("[Benchmark]Inference time(ms): min=")
    record = read_record(tmp_path / "b.json", EVAL_SCHEMA)
    assert record["map"] is None and record["latency_ms"]["p50"] > 0 and record["batch_size"] == 2


def test_benchmark_with_a_picture_times_this_picture(float_model, reader, tmp_path):
    reader.loader = None
    request = request_for(float_model.directory, benchmark=True, image_file=str(tmp_path / "data/images/1.png"))
    outcome = run_inference(request, reader=reader, say=quiet)
    assert outcome.record["input"].endswith("1.png") and outcome.record["latency_ms"]["p50"] > 0


def test_benchmark_without_the_data_set_uses_random_input(float_model, reader):
    def gone(*args, **kwargs):
        raise UserError("annotations.json is missing")

    reader.loader = gone
    said = []
    outcome = run_inference(request_for(float_model.directory, benchmark=True), reader=reader, say=said.append)
    assert outcome.record["input"] == "random" and any("annotations.json is missing" in line for line in said)


def test_a_picture_gets_its_boxes(model_path, reader, tmp_path):
    picture = tmp_path / "data" / "images" / "2.png"
    request = request_for(model_path, image_file=str(picture), output_dir=str(tmp_path / "out"))
    outcome = run_inference(request, reader=reader, say=quiet)
    assert outcome.detections.shape == (1, 6)
    np.testing.assert_allclose(outcome.detections[0, 2:], [16, 14, 48, 35], atol=0.01)
    assert outcome.lines[0].startswith("disc 0.8") and "x1 16.0  y1 14.0  x2 48.0  y2 35.0" in outcome.lines[0]
    drawn = cv2.imread(str(outcome.picture))
    assert outcome.picture == tmp_path / "out" / "2.png" and drawn.shape == cv2.imread(str(picture)).shape
    assert (drawn != cv2.imread(str(picture))).any()


def test_a_picture_is_never_written_over_the_one_it_came_from(model_path, reader, tmp_path):
    picture = tmp_path / "data" / "images" / "2.png"
    before = picture.read_bytes()
    request = request_for(model_path, image_file=str(picture), output_dir=str(picture.parent), threshold=0.99)
    outcome = run_inference(request, reader=reader, say=quiet)
    assert picture.read_bytes() == before and outcome.picture.name == "2_detections.png"
    assert outcome.lines[0].startswith("0 detections")


def test_class_names_come_from_the_model_when_the_data_set_is_not_here(model_path, reader, tmp_path):
    class Elsewhere:
        path, input_size, preprocess = reader.path, reader.input_size, reader.preprocess

        @property
        def class_names(self):
            raise UserError("annotation file is missing")

    (model_path / "infer_cfg.yml").write_text("label_list: [ring, box]\n", encoding="utf-8")
    request = request_for(model_path, image_file=str(tmp_path / "data/images/0.png"), output_dir=str(tmp_path / "out"))
    assert run_inference(request, reader=Elsewhere(), say=quiet).lines[0].startswith("ring 0.8")


def test_a_picture_is_shown_where_the_data_set_is_not(float_model, tmp_path):
    """Including its record: only the model and the reader's transforms are needed."""
    make_tiny_data(tmp_path / "data", images=1)
    model = Path(shutil.copytree(float_model.directory, tmp_path / "fp32"))
    (model / "infer_cfg.yml").write_text("label_list: [ring, box]\n", encoding="utf-8")
    (tmp_path / "reader.yml").write_text(
        "EvalDataset: {name: COCODataSet, image_dir: images, anno_path: a.json, dataset_dir: /nowhere}\n"
        "EvalReader:\n  sample_transforms:\n    - Decode: {}\n"
        "    - Resize: {target_size: [32, 32], keep_ratio: False}\n"
        "    - NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}\n    - Permute: {}\n",
        encoding="utf-8",
    )
    request = request_for(
        model,
        image_file=str(tmp_path / "data/images/0.png"),
        output_dir=str(tmp_path / "out"),
        reader_config=str(tmp_path / "reader.yml"),
        json=str(tmp_path / "shown.json"),
    )
    outcome = run_inference(request, say=quiet)
    assert outcome.exit_code == 0 and outcome.lines[0].startswith("ring 0.") and outcome.picture.is_file()
    record = read_record(tmp_path / "shown.json", EVAL_SCHEMA)
    assert record["reader_hash"] is None and record["detections"][0]["class"] == 0
    timed = dataclasses.replace(request, image_file=None, benchmark=True)
    assert run_inference(timed, say=quiet).record["input"] == "random"


def test_without_a_reader_a_picture_is_preprocessed_as_the_model_says(float_model, tmp_path):
    """The default reader is the sample's, with another size."""
    make_tiny_data(tmp_path / "data", images=1)
    model = Path(shutil.copytree(float_model.directory, tmp_path / "fp32"))
    request = request_for(
        model, image_file=str(tmp_path / "data/images/0.png"), output_dir=str(tmp_path / "out"), reader_config=None
    )
    with pytest.raises(UserError, match="That is the sample's reader: name your own, --reader_config=FILE"):
        run_inference(request, say=quiet)
    steps = ["{type: Resize, target_size: [32, 32], keep_ratio: false, interp: 2}"]
    steps += ["{type: NormalizeImage, mean: [0, 0, 0], std: [1, 1, 1], norm_type: none}", "{type: Permute}"]
    content = "label_list: [ring, box]\nPreprocess:\n" + "".join(f"- {step}\n" for step in steps)
    (model / "infer_cfg.yml").write_text(content, encoding="utf-8")
    outcome = run_inference(request, say=quiet)
    assert outcome.lines[0].startswith("ring 0.") and outcome.picture.is_file()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70000), (20000, 3)])
def test_pictures_of_any_size_are_drawn_on(tmp_path, height, width):
    from act_pipeline.inference.visualize import draw_detections

    assert cv2.imwrite(str(tmp_path / "in.png"), np.zeros((height, width, 3), np.uint8))
    box = np.float32([[0, 0.9, 0, 0, width, height]])
    assert draw_detections(tmp_path / "in.png", box, ["disc"], tmp_path / "out.png") == 1
    drawn = cv2.imread(str(tmp_path / "out.png"))
    assert max(drawn.shape[:2]) == min(max(height, width), 8192) and drawn.any()


def test_a_picture_of_more_pixels_than_opencv_takes_is_one_line(tmp_path):
    from act_pipeline.inference.visualize import read_image

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(UserError, match=r"huge.png cannot be decoded: OpenCV takes up to 2\^30 pixels"):
        read_image(tmp_path / "huge.png")


def test_img_shape_is_given_to_the_reader(float_model, reader):
    with pytest.raises(UserError, match=r"the reader gives \[1, 3, 64, 64\].*--img_shape=32"):
        run_inference(request_for(float_model.directory, img_shape=(64, 64)), reader=reader, say=quiet)
    large = reader.with_input_size(64, 64)
    assert (
        run_inference(request_for(float_model.directory, img_shape=(SIZE, SIZE)), reader=large, say=quiet).exit_code
        == 0
    )


def test_a_picture_that_is_none_and_a_record_that_is_a_folder(model_path, reader, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a.jpg cannot be decoded"):
        run_inference(request_for(model_path, image_file=str(tmp_path / "a.jpg")), reader=reader, say=quiet)
    reader.loader = None  # the path of the record is checked before the evaluation
    with pytest.raises(UserError, match="is a folder, expected a file name"):
        run_inference(request_for(model_path, json=str(tmp_path)), reader=reader, say=quiet)
    with pytest.raises(UserError, match="a.jpg is a file, expected a folder"):
        run_inference(request_for(model_path, json=str(tmp_path / "a.jpg" / "eval.json")), reader=reader, say=quiet)


# --- TensorRT: collect, then run -------------------------------------------------------------------------------------


def go_on(tmp_path: Path) -> list[str]:
    """A command that records that it was started, and with which environment."""
    code = (
        "import json, os, sys; json.dump([os.environ.get(sys.argv[2]), os.getpid()], open(sys.argv[1], 'w')); "
        "sys.exit(7)"
    )
    return [sys.executable, "-c", code, str(tmp_path / "started.json"), COLLECTED_VARIABLE]


def trt_request(model_path, **more) -> InferenceRequest:
    return InferenceRequest(model_path=str(model_path), use_trt=True, **more)


def run_trt(model_path, reader, paddle, rerun=None, say=quiet, **more):
    request = trt_request(model_path, **more)
    return run_inference(request, rerun=rerun, reader=reader, inference=paddle, here=GPU_MACHINE, say=say)


def test_the_first_run_collects_and_goes_on_in_a_fresh_process(model_path, reader, tmp_path):
    paddle, said = RecordingInference(), []
    outcome = run_trt(model_path, reader, paddle, go_on(tmp_path), said.append, batch_size=2)
    assert paddle.find("collect_shape_range_info") and paddle.find("enable_use_gpu")
    assert not paddle.find("enable_tensorrt_engine")  # not in the process that collected the shapes
    assert (model_path / SHAPES_FILENAME).read_text(encoding="utf-8") == "batches [1, 2]\n"
    assert json.loads((tmp_path / "started.json").read_text())[0] == "1"
    assert json.loads((tmp_path / "started.json").read_text())[1] != os.getpid()
    assert outcome.exit_code == 7  # the exit code of the new process
    assert [line for line in said if "collecting shapes on the GPU" in line and "not there yet" in line]


def test_the_second_run_builds_the_engine_and_evaluates(model_path, reader, tmp_path, monkeypatch):
    run_trt(model_path, reader, RecordingInference(), go_on(tmp_path))
    (tmp_path / "started.json").unlink()
    monkeypatch.setenv(COLLECTED_VARIABLE, "1")
    paddle = RecordingInference()
    outcome = run_trt(model_path, reader, paddle, go_on(tmp_path))
    assert not paddle.find("collect_shape_range_info") and not (tmp_path / "started.json").exists()
    assert paddle.find("enable_tuned_tensorrt_dynamic_shape")[0].args == (str(model_path / SHAPES_FILENAME), True)
    assert paddle.find("enable_tensorrt_engine")[0].kwargs["precision_mode"] == "Int8"
    assert (
        outcome.record["engine"] == "paddle_trt" and outcome.record["device"] == "GPU" and outcome.evaluation.map == 1.0
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("size", "was collected at 32 x 32, the input is 48 x 32"),
        ("batch", "batches up to 1, asked for 4"),
        ("model", "was collected from another model"),
        ("shapes", "was changed after it was collected"),
        ("record", f"has no {RECORD_FILENAME}"),
    ],
)
def test_shapes_that_no_longer_fit_are_collected_anew_and_it_is_said(
    float_model, model_path, reader, tmp_path, change, reason
):
    run_trt(model_path, reader, RecordingInference(), go_on(tmp_path))
    more = {}
    if change == "size":
        for name in ("model.pdmodel", "model.pdiparams"):  # dynamic input size, so that the reader determines it
            shutil.copy(
                export_tiny_model(tmp_path / "any", quantized=True, size=-1).directory / name, model_path / name
            )
        run_trt(model_path, reader, RecordingInference(), go_on(tmp_path))
        more["img_shape"] = (48, 32)
    elif change == "batch":
        more["batch_size"] = 4
    elif change == "model":
        for name in ("model.pdmodel", "model.pdiparams"):
            shutil.copy(float_model.directory / name, model_path / name)
    elif change == "shapes":
        (model_path / SHAPES_FILENAME).write_text("by hand", encoding="utf-8")
    else:
        (model_path / RECORD_FILENAME).unlink()
    paddle, said = RecordingInference(), []
    run_trt(model_path, reader, paddle, go_on(tmp_path), said.append, **more)
    assert paddle.find("collect_shape_range_info") and any(reason in line for line in said)
    # The newly collected shapes are used by the next run.
    paddle = RecordingInference()
    run_trt(model_path, reader, paddle, go_on(tmp_path), **more)
    assert paddle.find("enable_tensorrt_engine") and not paddle.find("collect_shape_range_info")


def test_a_process_that_went_on_never_starts_another(model_path, reader, tmp_path, monkeypatch):
    monkeypatch.setenv(COLLECTED_VARIABLE, "1")
    with pytest.raises(UserError, match="right after collecting"):
        run_trt(model_path, reader, RecordingInference(), go_on(tmp_path))
    assert not (tmp_path / "started.json").exists()


def test_in_a_notebook_the_outcome_says_to_run_it_again(model_path, reader):
    outcome = run_trt(model_path, reader, RecordingInference())
    assert outcome.exit_code == 0 and "fresh process" in outcome.lines[0]


def test_without_dynamic_shape_nothing_is_collected(model_path, reader):
    paddle = RecordingInference()
    run_trt(model_path, reader, paddle, use_dynamic_shape=False, precision="int8")
    assert not paddle.find("collect_shape_range_info") and not paddle.find("enable_tuned_tensorrt_dynamic_shape")


def test_calibration_by_tensorrt_takes_a_float_model(float_model, reader, tmp_path):
    model_path = shutil.copytree(float_model.directory, tmp_path / "float")
    paddle = RecordingInference()
    run_trt(model_path, reader, paddle, use_dynamic_shape=False, precision="int8", trt_calib_mode=True)
    assert paddle.find("enable_tensorrt_engine")[0].kwargs["use_calib_mode"] is True
    with pytest.raises(UserError, match="holds no INT8 scales"):
        run_trt(model_path, reader, paddle, use_dynamic_shape=False, precision="int8")


@pytest.mark.parametrize("more", [{}, {"use_trt": True}])
def test_collecting_only_works_on_a_cpu_for_real(model_path, reader, more):
    outcome = run_inference(
        request_for(model_path, collect_shape_only=True, batch_size=3, **more), reader=reader, say=quiet
    )
    assert outcome.lines == [f"shapes: {model_path / SHAPES_FILENAME}"]
    text = (model_path / SHAPES_FILENAME).read_text(encoding="utf-8")
    entry = next(part for part in text.split("shape_range_info") if '"image"' in part)
    assert "max_shape: 3" in entry and "min_shape: 1" in entry
    again = run_inference(
        request_for(model_path, collect_shape_only=True, batch_size=3, **more), reader=reader, say=quiet
    )
    assert "valid already" in again.lines[0]


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--use_trt=True",), r"paddle_trt int8 on GPU cannot run here.*requirements/gpu.txt"),
        (("--device=GPU",), r"paddle int8 on GPU cannot run here.*--device=CPU"),
        (("--use_trt=True", "--device=CPU"), r"paddle_trt runs on the GPU only; .*--use_trt=False"),
        (("--precision=fp16", "--device=CPU"), r"paddle has no fp16 on CPU"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line(model_path, reader, arguments, message):
    from act_pipeline.engines import machine

    if machine().cuda is not None:
        pytest.skip("this Paddle has CUDA")
    with pytest.raises(UserError, match=message):
        run_inference(parse_request([f"--model_path={model_path}", *arguments]), reader=reader, say=quiet)


def test_the_command_ends_user_errors_with_one_line_and_code_2(tmp_path, int8_model, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = command(f"--model_path={empty}", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and "model.pdmodel is missing" in done.stderr and done.stderr.count("\n") == 1
    )
    from act_pipeline.cli.eval import main
    from act_pipeline.engines import machine

    if machine().cuda is None:
        assert run_command(main, ["--use_trt=True", f"--model_path={int8_model.directory}"]) == 2
        error = capsys.readouterr().err
        assert "CPU package" in error and error.count("\n") == 1
    assert not (int8_model.directory / SHAPES_FILENAME).exists()


def test_without_the_sample_the_command_says_to_make_it(tmp_path):
    if (REPOSITORY / "output/rtdetr_sample_int8").exists():
        pytest.skip("the sample is made")
    with pytest.raises(UserError, match="model folder output/rtdetr_sample_int8 does not exist; run `make demo`"):
        run_inference(InferenceRequest(), say=quiet)


def test_the_command_evaluates_with_a_reader_file(int8_model, tmp_path):
    data = make_tiny_data(tmp_path / "data", images=3).parent
    write_reader(tmp_path / "reader.yml", data, settings="num_classes: 2")
    done = command(
        f"--model_path={int8_model.directory}",
        "--reader_config=reader.yml",
        "--precision=int8",
        "--use_mkldnn=False",
        "--cpu_threads=1",
        "--json=eval.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 15 and lines[0].startswith(" Average Precision  (AP) @[ IoU=0.50:0.95")
    record = read_record(tmp_path / "eval.json", EVAL_SCHEMA)
    assert record["map"] == 1.0 and record["images"] == 3 and record["reader_hash"].startswith("sha256:")


@pytest.mark.skipif(not (SHARED / "models/bccd").exists(), reason="needs ../shared/models/bccd beside the repository")
def test_a_real_model_scores_what_it_should(tmp_path):
    reader = write_reader(
        tmp_path / "reader.yml", SHARED / "data/bccd", "annotations/instances_test.json", 256, settings="num_classes: 3"
    )
    request = request_for(SHARED / "models/bccd", reader_config=str(reader), limit=12, batch_size=4)
    outcome = run_inference(request, say=quiet)
    # All 72 images give 0.5466, as in PaddleDetection with the same graph; these are the first twelve.
    assert outcome.evaluation.map == pytest.approx(BCCD_FIRST_TWELVE, abs=0.001)
    assert list(outcome.evaluation.per_class) == ["RBC", "WBC", "Platelets"]
