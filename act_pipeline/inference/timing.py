"""Time a model: on images of a data set, on one image, or on random input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.defaults import DEFAULT_READER
from act_pipeline.core.errors import UserError
from act_pipeline.data.random_input import random_batch
from act_pipeline.engines import Artifact, Engine
from act_pipeline.engines.interface import parallel_requests
from act_pipeline.evaluation import engine_record
from act_pipeline.evaluation.batches import mean_and_percentiles, measure_latency
from act_pipeline.evaluation.throughput import measure_throughput
from act_pipeline.families.interface import PROMPTS
from act_pipeline.inference.outcome import InferenceOutcome, Say, finished, latency_line
from act_pipeline.inference.request import InferenceRequest

BENCHMARK_IMAGES = 16
THROUGHPUT_SECONDS = 10.0


def time_engine(
    request: InferenceRequest, engine: Engine, model: Artifact, reader: Any, summary: Any, say: Say
) -> InferenceOutcome:
    """Time ``engine.run`` on up to :data:`BENCHMARK_IMAGES` images, in batches of the request's size.

    An engine with several requests is timed under load for :data:`THROUGHPUT_SECONDS` seconds.
    """
    count = max(request.batch_size, min(request.limit or BENCHMARK_IMAGES, BENCHMARK_IMAGES))
    try:
        images = first_images(request, reader, count)
        source = request.image_file or request.reader_config or str(DEFAULT_READER)
    except UserError as error:
        if request.image_file:
            raise
        # Speed does not depend on the image content.
        images, source = random_batch(model, summary.input_size or reader.input_size, count), "random"
        say(f"timing on random input, since the data set cannot be read: {error}")
    size = request.batch_size
    batches = [
        {name: array[start : start + size] for name, array in images.items()}
        for start in range(0, count - size + 1, size)
    ]
    requests = parallel_requests(engine)
    if requests == 1:
        latency_ms, images_per_second = measure_latency(engine, batches)
    else:
        burst = measure_throughput(engine, batches, requests, THROUGHPUT_SECONDS)
        latency_ms, images_per_second = mean_and_percentiles(burst.latencies), burst.images_per_second
    record = {
        **engine_record(engine, model, reader),
        "images": count,
        "map": None,
        "map50": None,
        "latency_ms": latency_ms,
        "images_per_second": images_per_second,
        "batch_size": size,
        "input": source,
        **({} if requests == 1 else {"requests": requests}),
    }
    lines = [
        f"[Benchmark]Inference time(ms): min={latency_ms['min']:.2f}, max={latency_ms['max']:.2f}, "
        f"avg={latency_ms['mean']:.2f}",
        latency_line(latency_ms, images_per_second, size, requests),
    ]
    return finished(request, InferenceOutcome(lines=lines, record=record))


def first_images(request: InferenceRequest, reader: Any, count: int) -> dict[str, np.ndarray]:
    """Return a batch of ``count`` from the requested image or the data set, repeated if there are fewer."""
    if request.image_file:
        batch: Mapping[str, np.ndarray] = reader.preprocess(request.image_file)
    else:
        loader = reader.loader("eval", batch_size=count, shuffle=False, drop_last=False)
        batch = next(iter(loader), {})
        if not batch:
            raise UserError(f"{reader.annotation_file('eval')} gives no image, expected at least one")
    # Without prompts, of a pair of models only this one is timed.
    return {name: np.resize(array, (count, *array.shape[1:])) for name, array in batch.items() if name != PROMPTS}
