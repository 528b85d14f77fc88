"""One call from a model folder to figures or a picture: what ``deploy/infer_eval.py`` does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.engines import Machine, create_engine, find_support, machine
from act_pipeline.engines.base import Engine, available_cpus
from act_pipeline.errors import UserError
from act_pipeline.evaluation import EVAL_SCHEMA, Evaluation, engine_record, evaluate, measure_latency
from act_pipeline.model import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel
from act_pipeline.records import write_record

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_READER = Path("configs/readers/sample_reader.yml")
DEFAULT_MODELS = {"int8": Path("output/sample/int8"), "float": Path("output/sample/fp32")}
# Set for the process that goes on after the shapes were collected, so that it never collects and starts another one.
COLLECTED_VARIABLE = "ACT_PIPELINE_SHAPES_COLLECTED"
BENCHMARK_IMAGES = 16

Say = Callable[[str], None]


@dataclass(frozen=True)
class InferenceRequest:
    """What to run and where; the fields are the flags of ``deploy/infer_eval.py``.

    Attributes:
        model_path: the model folder; None: the sample's, INT8 unless ``precision`` is a float one.
        model_filename: the program in it.
        params_filename: the parameters in it.
        reader_config: the reader YAML; None: the sample's.
        image_file: run on this picture instead of the data set, and draw.
        device: ``auto`` (a GPU if there is one that Paddle can use), ``CPU`` or ``GPU``.
        precision: ``fp32``, ``fp16``, ``int8``; None: int8 for an INT8 model, fp32 for a float one.
        use_trt: run in TensorRT.
        use_dynamic_shape: give TensorRT the collected shapes.
        use_mkldnn: use oneDNN on the CPU.
        cpu_threads: None: all CPUs that this process may use.
        benchmark: time only, on the data set's first images, on ``image_file``, or on random input without either.
        include_nms: has no effect on RT-DETR, which has no NMS.
        trt_calib_mode: TensorRT calibrates INT8 scales itself.
        img_shape: (height, width) of the network's input; None: the reader's.
        batch_size: images in a run.
        limit: the first so many images of the data set.
        threshold: smallest score that is drawn and listed.
        output_dir: where pictures go.
        json: where to write the record, ``eval.json``.
        collect_shape_only: stop when the shapes are collected.
    """

    model_path: str | None = None
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME
    reader_config: str | None = None
    image_file: str | None = None
    device: str = "auto"
    precision: str | None = None
    use_trt: bool = False
    use_dynamic_shape: bool = True
    use_mkldnn: bool = False
    cpu_threads: int | None = None
    benchmark: bool = False
    include_nms: bool = True
    trt_calib_mode: bool = False
    img_shape: tuple[int, int] | None = None
    batch_size: int = 1
    limit: int | None = None
    threshold: float = 0.5
    output_dir: str = "output/infer"
    json: str | None = None
    collect_shape_only: bool = False


@dataclass
class InferenceOutcome:
    """What came of a request.

    Attributes:
        exit_code: 0, or that of the process that went on.
        lines: what to print.
        evaluation: for an evaluation.
        record: what ``json`` holds.
        detections: for a picture: [K, 6] class index, score, x1, y1, x2, y2, those above the threshold.
        picture: the file that was drawn.
    """

    exit_code: int = 0
    lines: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None
    record: dict[str, Any] | None = None
    detections: np.ndarray | None = None
    picture: Path | None = None


def run_inference(
    request: InferenceRequest,
    rerun: Sequence[str] | None = None,
    say: Say = lambda line: print(line, file=sys.stderr),
    reader: Any = None,
    inference: Any = None,
    here: Machine | None = None,
) -> InferenceOutcome:
    """Evaluate, time or show a model.

    With TensorRT and no (valid) collected shapes, they are collected first. Paddle cannot build TensorRT's engines in
    the process that collected, so the same request then goes on in a fresh one.

    Args:
        request: what to run.
        rerun: the command line that makes the same request; None (a notebook, say): a second call is needed, and the
            outcome says so.
        say: takes a line about what happens next.
        reader: a reader; None: made from ``request.reader_config``.
        inference: ``paddle.inference``, or a stand-in with its names.
        here: this machine, or a stand-in.

    Raises:
        UserError: the request cannot be met; what is missing and what would work.
    """
    if request.json is not None:
        _check_record_path(Path(request.json))
    model = _load_model(request)
    here = here or machine()
    device = _device(request, here)
    if device == "GPU" and request.use_mkldnn:
        raise UserError("--use_mkldnn=True is for the CPU, --device is GPU; leave one of them out")
    from act_pipeline.engines.dynamic_shape import shapes_path
    from act_pipeline.engines.model_files import inspect_model

    if here.paddle is None:
        find_support("paddle", "fp32", "CPU", here).require()
    summary = inspect_model(model)
    precision = request.precision or ("int8" if summary.quantized else "fp32")
    collecting = request.collect_shape_only or (request.use_trt and request.use_dynamic_shape)
    name = "paddle_trt" if request.use_trt else "paddle_onednn" if request.use_mkldnn else "paddle"
    if not request.collect_shape_only:
        find_support(name, precision, device, here).require()
    threads = request.cpu_threads or available_cpus()
    reader = _reader(request, reader)
    if collecting:
        collected = _collect_if_stale(request, model, reader, summary, device, threads, here, inference, say)
        if request.collect_shape_only:
            shapes = collected or f"{shapes_path(model)}, valid already"
            return InferenceOutcome(lines=[f"shapes: {shapes}"])
        if collected:
            return _go_on_in_a_fresh_process(rerun, say)
    if not request.include_nms:
        say("--include_nms=False has no effect: RT-DETR picks its boxes without NMS")
    if precision == "int8" and name == "paddle":
        say(
            "int8 in Paddle's own kernels computes every Q/DQ in float: the accuracy is what the model was made for, "
            "the latency is not what INT8 kernels reach"
        )
    options: dict[str, Any] = {"summary": summary, "inference": inference, "machine": here}
    if name == "paddle_trt":
        say(f"loading the TensorRT engine of {model.directory}; the first time it is built, which takes minutes")
        options.update(
            batch_size=request.batch_size, dynamic_shape=request.use_dynamic_shape, calibrate=request.trt_calib_mode
        )
    engine = create_engine(name, model, precision, device, threads, **options)
    with contextlib.closing(engine):
        if request.benchmark:
            return _benchmark(request, engine, model, reader, summary, say)
        if request.image_file:
            return _show(request, engine, model, reader)
        return _evaluate(request, engine, model, reader, say)


def _load_model(request: InferenceRequest) -> InferenceModel:
    path = request.model_path
    if path is None:
        default = DEFAULT_MODELS["int8" if request.precision in (None, "int8") else "float"]
        path = _default_path(default)
        if not path.exists():
            raise UserError(
                f"model folder {default} does not exist; run `make demo`, which makes it, or give --model_path"
            )
    return InferenceModel.load(path, request.model_filename, request.params_filename)


def _check_record_path(path: Path) -> None:
    """Find out before the work, not after it, that its record has no place."""
    if path.is_dir():
        raise UserError(f"--json={path} is a folder, expected a file name such as {path / 'eval.json'}")
    folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
    if not folder.is_dir():
        raise UserError(f"--json={path}: {folder} is a file, expected a folder; choose another place")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--json={path}: no permission to write to {folder}; choose another place")


def _default_path(path: Path) -> Path:
    return path if path.exists() else REPOSITORY / path if (REPOSITORY / path).exists() else path


def _device(request: InferenceRequest, here: Machine) -> str:
    if request.device != "auto":
        return request.device
    # TensorRT asked for: let the GPU's entry say what is missing, instead of "no TensorRT on CPU".
    return "GPU" if here.gpus or (request.use_trt and not request.collect_shape_only) else "CPU"


def _reader(request: InferenceRequest, reader: Any) -> Any:
    if reader is None:
        from act_pipeline.data import Reader

        config = Path(request.reader_config) if request.reader_config else _default_path(DEFAULT_READER)
        reader = Reader.load(config)
    if request.img_shape is not None and tuple(reader.input_size) != tuple(request.img_shape):
        reader = reader.with_input_size(*request.img_shape)
    return reader


def _collect_if_stale(
    request: InferenceRequest,
    model: InferenceModel,
    reader: Any,
    summary: Any,
    device: str,
    threads: int,
    here: Machine,
    inference: Any,
    say: Say,
) -> Path | None:
    """Return the path of the shapes if they were collected just now, None if those at hand are valid."""
    from act_pipeline.engines.dynamic_shape import ShapeKey, collect, stale_reason

    height, width = reader.input_size
    key = ShapeKey(model.content_hash(), (int(height), int(width)), request.batch_size, str(here.paddle))
    reason = stale_reason(model, key)
    if reason is None:
        return None
    if os.environ.get(COLLECTED_VARIABLE):
        raise UserError(f"{reason}, right after collecting; is another process writing to {model.directory}?")
    say(f"{reason}: collecting shapes on the {device}")
    find_support("paddle", "fp32", device, here).require()
    batch = _first_images(request, reader, request.batch_size)
    one = {name: array[:1] for name, array in batch.items()}
    return collect(model, key, [one, batch], device, threads, summary, inference)


def _first_images(request: InferenceRequest, reader: Any, count: int) -> dict[str, np.ndarray]:
    """Return a batch of ``count``, from the picture asked for or the data set; repeated if there are fewer."""
    if request.image_file:
        batch: Mapping[str, np.ndarray] = reader.preprocess(request.image_file)
    else:
        loader = reader.loader("eval", batch_size=count, shuffle=False, drop_last=False)
        batch = next(iter(loader), {})
        if not batch:
            raise UserError(f"{reader.annotation_file('eval')} gives no image, expected at least one")
    return {name: np.resize(array, (count, *array.shape[1:])) for name, array in batch.items()}


def _go_on_in_a_fresh_process(rerun: Sequence[str] | None, say: Say) -> InferenceOutcome:
    if rerun is None:
        return InferenceOutcome(lines=["shapes are collected; run it again in a fresh process to build the engine"])
    say("shapes are collected; going on in a fresh process")
    code = subprocess.run(list(rerun), env={**os.environ, COLLECTED_VARIABLE: "1"}, check=False).returncode
    return InferenceOutcome(exit_code=code if code >= 0 else 128 - code)


def _evaluate(
    request: InferenceRequest, engine: Engine, model: InferenceModel, reader: Any, say: Say
) -> InferenceOutcome:
    say(f"evaluating {model.directory}: {engine.name} {engine.precision} on {engine.device}, {engine.threads} threads")
    evaluation = evaluate(engine, reader, "eval", limit=request.limit, batch_size=request.batch_size)
    record = evaluation.as_record(engine, model, reader)
    lines = [
        *evaluation.summary,
        f"mAP {evaluation.map:.4f}, mAP50 {evaluation.map50:.4f} on {evaluation.images} images",
        _latency_line(evaluation.latency_ms, evaluation.images_per_second, evaluation.batch_size),
    ]
    return _finish(request, InferenceOutcome(lines=lines, evaluation=evaluation, record=record))


def _benchmark(
    request: InferenceRequest, engine: Engine, model: InferenceModel, reader: Any, summary: Any, say: Say
) -> InferenceOutcome:
    count = max(request.batch_size, min(request.limit or BENCHMARK_IMAGES, BENCHMARK_IMAGES))
    try:
        images = _first_images(request, reader, count)
        source = request.image_file or request.reader_config or str(DEFAULT_READER)
    except UserError as error:
        if request.image_file:
            raise
        # Speed does not depend on what is in the pictures.
        images, source = _random_images(reader, summary, count), "random"
        say(f"timing on random input, since the data set cannot be read: {error}")
    size = request.batch_size
    batches = [
        {name: array[start : start + size] for name, array in images.items()}
        for start in range(0, count - size + 1, size)
    ]
    latency_ms, images_per_second = measure_latency(engine, batches)
    record = {
        **engine_record(engine, model, reader),
        "images": count,
        "map": None,
        "map50": None,
        "latency_ms": latency_ms,
        "images_per_second": images_per_second,
        "batch_size": size,
        "input": source,
    }
    lines = [
        f"[Benchmark]Inference time(ms): min={latency_ms['min']:.2f}, max={latency_ms['max']:.2f}, "
        f"avg={latency_ms['mean']:.2f}",
        _latency_line(latency_ms, images_per_second, size),
    ]
    return _finish(request, InferenceOutcome(lines=lines, record=record))


def _random_images(reader: Any, summary: Any, count: int) -> dict[str, np.ndarray]:
    height, width = summary.input_size or reader.input_size
    random = np.random.default_rng(0)
    return {
        "image": random.random((count, 3, height, width), np.float32),
        "im_shape": np.tile(np.float32([height, width]), (count, 1)),
        "scale_factor": np.ones((count, 2), np.float32),
    }


def _show(request: InferenceRequest, engine: Engine, model: InferenceModel, reader: Any) -> InferenceOutcome:
    from act_pipeline.visualize import detection_label, draw_detections, read_image

    image_file = str(request.image_file)
    read_image(image_file)  # says in our words what is wrong with the file, before the reader meets it
    bbox = engine.run(reader.preprocess(image_file))["bbox"]
    names = _class_names(reader, model)
    output = Path(request.output_dir) / Path(image_file).name
    if output.resolve() == Path(image_file).resolve():
        output = output.with_name(f"{output.stem}_detections{output.suffix}")
    draw_detections(image_file, bbox, names, output, request.threshold)
    shown = bbox[bbox[:, 1] >= request.threshold]
    shown = shown[np.argsort(-shown[:, 1], kind="stable")]
    lines = [
        f"{detection_label(row[0], row[1], names)}  x1 {row[2]:.1f}  y1 {row[3]:.1f}  x2 {row[4]:.1f}  y2 {row[5]:.1f}"
        for row in shown
    ]
    lines.append(f"{len(shown)} detections with a score of at least {request.threshold:g}; picture: {output}")
    record = {
        **engine_record(engine, model, reader),
        "image": image_file,
        "threshold": request.threshold,
        "detections": [
            {"class": int(row[0]), "score": float(row[1]), "bbox": [float(value) for value in row[2:]]} for row in shown
        ],
    }
    return _finish(request, InferenceOutcome(lines=lines, detections=shown, picture=output, record=record))


def _class_names(reader: Any, model: InferenceModel) -> Sequence[str]:
    try:
        return list(reader.class_names)
    except UserError:  # the data set is not here; a picture can be shown all the same
        return [str(name) for name in model.infer_cfg().get("label_list") or []]


def _latency_line(latency_ms: Mapping[str, float], images_per_second: float, batch_size: int) -> str:
    figures = ", ".join(f"{name} {latency_ms[name]:.2f}" for name in ("min", "p50", "p90", "p99", "max"))
    return f"latency ms a batch of {batch_size}: {figures}; {images_per_second:.2f} images/s"


def _finish(request: InferenceRequest, outcome: InferenceOutcome) -> InferenceOutcome:
    if request.json is None or outcome.record is None:
        return outcome
    write_record(request.json, EVAL_SCHEMA, outcome.record)
    return replace(outcome, lines=[*outcome.lines, f"record: {request.json}"])
