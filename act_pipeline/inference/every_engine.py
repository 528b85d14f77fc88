"""A model in every engine of this machine, compared with its float model: ``infer_eval --engine=all``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from act_pipeline.benchmark.plan import BenchmarkRequest
from act_pipeline.benchmark.run import BenchmarkOutcome, run_benchmark
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
from act_pipeline.engines import inspect_artifact
from act_pipeline.inference.engine_selection import load_model
from act_pipeline.inference.request import InferenceRequest

# Comparison with exact Q/DQ computation shows an accuracy loss that is specific to one runtime.
_REFERENCE = "int8_reference"


def run_in_every_engine(request: InferenceRequest, say: Callable[[str], None], reader: Any = None) -> BenchmarkOutcome:
    """Time and evaluate a model, and the float model of an INT8 one, in all engines of this machine.

    Args:
        request: a request whose ``engine`` is ``all``.
        say: is called with one line per step.
        reader: a reader; None to create it from ``request.reader_config``.

    Raises:
        UserError: flags for a single engine are given, or nothing can run.
    """
    for flag, given in (
        ("--image_file", request.image_file), ("--use_trt", request.use_trt), ("--use_mkldnn", request.use_mkldnn),
        ("--shards", request.sharded), ("--benchmark", request.benchmark),
        ("--collect_shape_only", request.collect_shape_only),
    ):  # fmt: skip
        if given:
            raise UserError(f"{flag} is for one engine, --engine is all; leave one of them out")
    model = load_model(request)
    if not isinstance(model, InferenceModel):
        raise UserError(f"{model.path} is a single file, --engine=all takes a model folder; name one engine")
    quantized = inspect_artifact(model).quantized
    source = float_source(model) if quantized else model
    if source is None:
        say(f"the float model that {model.directory} was made from is no longer there: only INT8 is measured")
    return run_benchmark(
        BenchmarkRequest(
            model_path=str(source.directory) if source else None,
            int8_model_path=str(model.directory) if quantized else None,
            model_filename=request.model_filename,
            params_filename=request.params_filename,
            reader_config=request.reader_config,
            precisions=(request.precision,) if request.precision else None,
            device=request.device,
            cpu_threads=request.cpu_threads,
            batch_size=request.batch_size,
            limit=request.limit,
            quick=True,
            reference=quantized,
            json=request.json,
        ),
        say,
        reader,
    )


def float_source(model: InferenceModel) -> Optional[InferenceModel]:
    """Return the float model named in an INT8 model's ``act.json``; None if it is missing or has changed."""
    try:
        record = read_record(model.directory / ACT_FILENAME, ACT_SCHEMA)
        names = record["config"]["Global"]
        source = InferenceModel.load(names["model_dir"], names["model_filename"], names["params_filename"])
    except (UserError, KeyError, TypeError):
        return None
    return source if source.content_hash() == record.get("source_hash") else None
