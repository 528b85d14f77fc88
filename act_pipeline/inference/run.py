"""From a request to scores, latencies or a drawn image: ``deploy/infer_eval.py``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, location
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_file, require_writable_folder
from act_pipeline.engines import Artifact, Machine, create_engine, find_support, inspect_artifact, machine
from act_pipeline.engines.interface import AUTO_REQUESTS
from act_pipeline.engines.registry import find_runtime
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
    _check_hint(request)
    if request.json is not None:
        require_writable_file(request.json, "--json", "eval.json")
    if request.image_file:
        require_writable_folder(request.output_dir, "--output_dir")
    if request.engine == ALL:
        from act_pipeline.inference.every_engine import run_in_every_engine

        found = run_in_every_engine(request, say, reader)
        return InferenceOutcome(lines=found.lines, record=found.record.as_json())
    model = load_model(request)
    here = here or machine()
    summary = inspect_artifact(model, here)
    choice = choose_engine(request, model, summary.quantized, here)
    if choice.why:
        say(f"--engine=auto takes {choice.name}: {choice.why}")
    name, precision, device = choice.name, choice.precision, choice.device
    runtime = find_runtime(name)
    if not request.collect_shape_only:
        find_support(name, precision, device, here).require()
    threads = request.cpu_threads or available_cpus()
    if request.sharded:
        from act_pipeline.evaluation.sharded import shard_threads

        threads = shard_threads(request.cpu_threads, request.executor, request.shards)
    reader = _reader(request, reader, model, say)
    if isinstance(model, InferenceModel) and (
        request.collect_shape_only or (runtime.shapes and request.use_dynamic_shape)
    ):
        collected = collect_if_stale(
            request, model, reader, summary, device=device, threads=threads, here=here, inference=inference, say=say
        )
        if request.collect_shape_only:
            from act_pipeline.engines.paddle.dynamic_shape import shapes_path

            shapes = collected or f"{shapes_path(model)}, valid already"
            return InferenceOutcome(lines=[f"shapes: {shapes}"])
        if collected:
            return continue_in_a_new_process(rerun, say)
    if not request.include_nms:
        say("--include_nms=False has no effect: the model's outputs decide whether NMS is left to do")
    if runtime.slow_start:
        say(f"loading {location(model)} in {name}; {runtime.slow_start}")
    options: dict[str, Any] = {}
    if runtime.shapes:
        options.update(dynamic_shape=request.use_dynamic_shape, calibrate=request.trt_calib_mode)
    if request.hint == "throughput":
        if runtime.requests:
            options.update(requests=AUTO_REQUESTS)
        else:
            say(f"--hint=throughput has no effect: {name} runs one request at a time; a larger --batch_size may help")
    known = {"summary": summary, "inference": inference, "machine": here}
    engine = create_engine(name, model, precision, device, threads, batch_size=request.batch_size, **known, **options)
    if precision == "int8" and runtime.int8_note:
        say(runtime.int8_note)
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


def _check_hint(request: InferenceRequest) -> None:
    if request.hint != "throughput":
        return
    if request.engine == ALL:
        raise UserError(
            "--hint=throughput is for one engine, --engine is all; deploy/benchmark.py --throughput has all"
        )
    for flag, given in (("--image_file", request.image_file and not request.benchmark), ("--shards", request.sharded)):
        if given:
            raise UserError(f"--hint=throughput contradicts {flag}; leave one of them out")


def _reader(request: InferenceRequest, reader: Any, model: Artifact, say: Say) -> Any:
    """Return the reader adapted to the model."""
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import constant_inputs, fit_reader, reader_of_model, with_embeddings

    given = reader is not None or request.reader_config is not None
    if reader is None:
        reader = Reader.load(request.reader_config or find_shipped(DEFAULT_READER))
    if not given and request.image_file:
        reader = reader_of_model(model, reader)
    if request.img_shape is not None and tuple(reader.input_size) != tuple(request.img_shape):
        reader = reader.with_input_size(*request.img_shape)
    if not isinstance(reader, Reader):
        return reader
    if request.benchmark:  # speed does not depend on the image content
        return with_embeddings(model, reader.with_constants(constant_inputs(model)))
    try:
        fit = fit_reader(model, reader)
    except UserError as error:
        if given:
            raise
        raise UserError(f"{error}. That is the sample's reader: name your own, --reader_config=FILE") from None
    if request.image_file and fit.reader.settings.prompts is not None:
        raise UserError(
            f"{location(model)} segments what is in a box, and --image_file={request.image_file} comes without boxes, "
            "expected a data set with boxes: leave it out and give --reader_config"
        )
    for note in fit.notes:
        say(note)
    return fit.reader
