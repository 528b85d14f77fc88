"""From a request to scores, latencies or a drawn image: ``deploy/infer_eval.py``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError
<<<<<<< HEAD
from act_pipeline.engines import Artifact, Machine, create_engine, find_support, inspect_artifact, machine
=======
from act_pipeline.core.fresh_process import package_environment
from act_pipeline.core.records import write_record
from act_pipeline.engines import Artifact, Engine, Machine, create_engine, find_support, inspect_artifact, machine
>>>>>>> wt-cli
from act_pipeline.engines.interface import location
from act_pipeline.inference.engine_selection import ALL, choose_engine, load_model
from act_pipeline.inference.evaluation import evaluate_once, evaluate_sharded
from act_pipeline.inference.outcome import InferenceOutcome, Say
from act_pipeline.inference.picture import show_detections
from act_pipeline.inference.request import InferenceRequest
from act_pipeline.inference.shapes import collect_if_stale, continue_in_a_new_process
from act_pipeline.inference.timing import time_engine


def run_inference(
    request: InferenceRequest,
    rerun: Sequence[str] | None = None,
    say: Say = lambda line: print(line, file=sys.stderr),
    reader: Any = None,
    inference: Any = None,
    here: Machine | None = None,
) -> InferenceOutcome:
    """Evaluate or time a model, or draw its detections.

    TensorRT in Paddle needs collected shapes; if these are missing or outdated, they are collected first. Paddle cannot
    build TensorRT engines in the process that collected shapes, so the request then continues in a new process.

    Args:
        request: what to run.
        rerun: the command line that repeats the request; None (e.g. in a notebook) if there is none, then a second call
            is needed, and the outcome states this.
        say: is called with one line per step.
        reader: a reader; None to create it from ``request.reader_config``.
        inference: ``paddle.inference``, or a substitute for tests.
        here: this machine, or a substitute for tests.

    Raises:
        UserError: the request cannot be fulfilled; the message states what is missing and what would work.
    """
    _check_shards(request)
    if request.json is not None:
        _check_record_path(Path(request.json))
    if request.engine == ALL:
        from act_pipeline.inference.every_engine import run_in_every_engine

        found = run_in_every_engine(request, say, reader)
        return InferenceOutcome(lines=found.lines, record=found.record)
    model = load_model(request)
    here = here or machine()
    summary = inspect_artifact(model, here)
    choice = choose_engine(request, model, summary.quantized, here)
    if choice.why:
        say(f"--engine=auto takes {choice.name}: {choice.why}")
    name, precision, device = choice.name, choice.precision, choice.device
    if not request.collect_shape_only:
        find_support(name, precision, device, here).require()
    threads = request.cpu_threads or available_cpus()
    if request.sharded:
        from act_pipeline.evaluation.sharded import shard_threads

        threads = shard_threads(request.cpu_threads, request.executor, request.shards)
    reader = _reader(request, reader, model, say)
    if isinstance(model, InferenceModel) and (
        request.collect_shape_only or (name == "paddle_trt" and request.use_dynamic_shape)
    ):
        collected = collect_if_stale(request, model, reader, summary, device, threads, here, inference, say)
        if request.collect_shape_only:
            from act_pipeline.engines.paddle.dynamic_shape import shapes_path

            shapes = collected or f"{shapes_path(model)}, valid already"
            return InferenceOutcome(lines=[f"shapes: {shapes}"])
        if collected:
            return continue_in_a_new_process(rerun, say)
    if not request.include_nms:
        say("--include_nms=False has no effect: RT-DETR picks its boxes without NMS")
    if name in ("paddle_trt", "tensorrt"):
        say(f"loading the TensorRT engine of {location(model)}; the first time it is built, which takes minutes")
    options: dict[str, Any] = {}
    if name == "paddle_trt":
        options.update(dynamic_shape=request.use_dynamic_shape, calibrate=request.trt_calib_mode)
    known = {"summary": summary, "inference": inference, "machine": here}
    engine = create_engine(name, model, precision, device, threads, batch_size=request.batch_size, **known, **options)
    if precision == "int8" and name == "paddle":
        say(
            "int8 in Paddle's own kernels computes every Q/DQ in float: the accuracy is what the model was made for, "
            "the latency is not what INT8 kernels reach; --engine=auto takes the engine that is fastest here"
        )
    with contextlib.closing(engine):
        if request.benchmark:
            return time_engine(request, engine, model, reader, summary, say)
        if request.image_file:
            return show_detections(request, engine, model, reader)
        if not request.sharded:
            return evaluate_once(request, engine, model, reader, say)
    return evaluate_sharded(request, engine, model, reader, say, options)


def _check_shards(request: InferenceRequest) -> None:
    if request.executor == "local" and request.ray_address:
        raise UserError(
            f"--ray_address={request.ray_address} is for --executor=ray; add that, or leave the address out"
        )
    if not request.sharded:
        return
    asked = f"--shards={request.shards}" if request.shards else "--executor=ray"
    alone = {
        "--image_file": request.image_file,
        "--benchmark": request.benchmark,
        "--collect_shape_only": request.collect_shape_only,
    }
    for flag, given in alone.items():
        if given:
            raise UserError(
                f"{asked} spreads the evaluation of a data set over processes, {flag} takes one process; leave one of "
                "them out"
            )


def _check_record_path(path: Path) -> None:
    """Check before the work starts that the record can be written."""
    if path.is_dir():
        raise UserError(f"--json={path} is a folder, expected a file name such as {path / 'eval.json'}")
    folder = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
    if not folder.is_dir():
        raise UserError(f"--json={path}: {folder} is a file, expected a folder; choose another place")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--json={path}: no permission to write to {folder}; choose another place")


def _reader(request: InferenceRequest, reader: Any, model: Artifact, say: Say) -> Any:
    """Return the reader adapted to the model."""
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import fit_reader, reader_of_model

    given = reader is not None or request.reader_config is not None
    if reader is None:
        reader = Reader.load(request.reader_config or find_shipped(DEFAULT_READER))
    if not given and request.image_file:
        reader = reader_of_model(model, reader)
    if request.img_shape is not None and tuple(reader.input_size) != tuple(request.img_shape):
        reader = reader.with_input_size(*request.img_shape)
    if not isinstance(reader, Reader) or request.benchmark:  # speed does not depend on the image content
        return reader
    try:
        fit = fit_reader(model, reader)
    except UserError as error:
        if given:
            raise
        raise UserError(f"{error}. That is the sample's reader: name your own, --reader_config=FILE") from None
    for note in fit.notes:
        say(note)
    return fit.reader
<<<<<<< HEAD
=======


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
    from act_pipeline.engines.paddle.dynamic_shape import ShapeKey, collect, stale_reason

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
    code = subprocess.run(list(rerun), env=package_environment(**{COLLECTED_VARIABLE: "1"}), check=False).returncode
    return InferenceOutcome(exit_code=code if code >= 0 else 128 - code)


def _evaluate(request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, say: Say) -> InferenceOutcome:
    say(f"evaluating {location(model)}: {engine.name} {engine.precision} on {engine.device}, {engine.threads} threads")
    evaluation = evaluate(engine, reader, "eval", limit=request.limit, batch_size=request.batch_size)
    compared, said = against_float(model, evaluation, reader)
    record = evaluation.as_record(engine, model, reader, executor="local", shards=1, **compared)
    lines = [
        *_score_lines(evaluation),
        *said,
        _latency_line(evaluation.latency_ms, evaluation.images_per_second, evaluation.batch_size),
    ]
    return _finish(request, InferenceOutcome(lines=lines, evaluation=evaluation, record=record))


def _evaluate_in_shards(
    request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, say: Say, options: Mapping[str, Any]
) -> InferenceOutcome:
    from act_pipeline.evaluation.sharded import evaluate_in_shards

    where = "on a Ray cluster" if request.executor == "ray" else f"in {request.shards} processes"
    say(
        f"evaluating {location(model)} {where}: {engine.name} {engine.precision} on {engine.device}, {engine.threads} "
        "threads each"
    )
    sharded = evaluate_in_shards(
        engine, model, reader, request.shards, request.executor, request.ray_address, request.limit,
        request.batch_size, options=options,
    )  # fmt: skip
    evaluation = sharded.evaluation
    compared, said = against_float(model, evaluation, reader)
    lines = [
        *_score_lines(evaluation),
        *said,
        f"{evaluation.images_per_second:.2f} images/s in {sharded.shards} processes, {sharded.wall_seconds:.1f} s with "
        "their start; for latencies, run one engine alone",
    ]
    record = evaluation.as_record(engine, model, reader, **sharded.more, **compared)
    return _finish(request, InferenceOutcome(lines=lines, evaluation=evaluation, record=record))


def _score_lines(evaluation: Evaluation) -> list[str]:
    scores = f"mAP {evaluation.map:.4f}, mAP50 {evaluation.map50:.4f} on {evaluation.images} images"
    return [*evaluation.summary, scores]


def _benchmark(
    request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, summary: Any, say: Say
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


def _show(request: InferenceRequest, engine: Engine, model: Artifact, reader: Any) -> InferenceOutcome:
    from act_pipeline.inference.visualize import detection_label, draw_detections, read_image

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


def _class_names(reader: Any, model: Artifact) -> Sequence[str]:
    """Return the names by class index: the model's own where it has them, which needs no data set, else the data's."""
    with contextlib.suppress(UserError):
        return list(reader.class_names)
    # A lowered file lies in onnx/ in the folder of its model.
    folders = [model.directory, model.directory.parent] if isinstance(model, OnnxModel) else [model.directory]
    labels = (InferenceModel(folder).infer_cfg().get("label_list") for folder in folders)
    names = next(filter(None, labels), [])
    return [str(name) for name in names] if isinstance(names, list) else []


def _latency_line(latency_ms: Mapping[str, float], images_per_second: float, batch_size: int) -> str:
    figures = ", ".join(f"{name} {latency_ms[name]:.2f}" for name in ("min", "p50", "p90", "p99", "max"))
    return f"latency ms a batch of {batch_size}: {figures}; {images_per_second:.2f} images/s"


def _finish(request: InferenceRequest, outcome: InferenceOutcome) -> InferenceOutcome:
    if request.json is None or outcome.record is None:
        return outcome
    write_record(request.json, EVAL_SCHEMA, outcome.record)
    return replace(outcome, lines=[*outcome.lines, f"record: {request.json}"])
>>>>>>> wt-cli
