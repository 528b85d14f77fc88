"""Measurement of an engine's throughput with several requests in parallel."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from act_pipeline.evaluation.batches import Detector

# Fewer runs of each request, and the start and the end, where not all of them compute, would weigh too much.
MIN_RUNS = 3


@dataclass(frozen=True)
class Burst:
    """The runs of an engine under constant load.

    Attributes:
        images: number of images.
        seconds: from the start of the first run to the end of the last.
        latencies: duration of each run in seconds, from the call to its detections; with more requests than the engine
            computes at a time, this includes waiting.
    """

    images: int
    seconds: float
    latencies: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """Images / ``seconds``."""
        return self.images / max(self.seconds, 1e-9)


def measure_throughput(
    engine: Detector, batches: Sequence[Mapping[str, np.ndarray]], requests: int, seconds: float, warmup: int = 1
) -> Burst:
    """Keep a number of requests running, each of which starts the next batch as soon as its last one has ended.

    Args:
        engine: the engine; ``run`` may be called from ``requests`` threads.
        batches: the engine's inputs, all of one batch size, in memory; used cyclically.
        requests: number of requests in parallel, at least 1.
        seconds: no run starts later than this, but each request runs at least :data:`MIN_RUNS` times.
        warmup: number of untimed runs of each request.

    Raises:
        UserError: a run fails.
    """
    # All wait for the last one, so that the start of the threads and the warm-up are not part of the time.
    ready = threading.Barrier(requests)
    turns = itertools.count()

    def keep_running(_: int) -> tuple[float, list[tuple[float, float]]]:
        try:
            for _ in range(warmup):
                engine.run(batches[next(turns) % len(batches)])
            ready.wait()
        except threading.BrokenBarrierError:  # another request failed, whose error is raised
            return 0.0, []
        except BaseException:
            ready.abort()
            raise
        start = end = time.perf_counter()
        spans: list[tuple[float, float]] = []
        while len(spans) < MIN_RUNS or end < start + seconds:
            batch = batches[next(turns) % len(batches)]
            begin = time.perf_counter()
            engine.run(batch)
            end = time.perf_counter()
            spans.append((begin, end))
        return start, spans

    with ThreadPoolExecutor(requests, thread_name_prefix="request") as pool:
        futures = [pool.submit(keep_running, place) for place in range(requests)]
    found = [future.result() for future in futures]
    spans = [span for _, of_request in found for span in of_request]
    return Burst(
        images=len(spans) * len(batches[0]["image"]),
        seconds=max(end for _, end in spans) - min(start for start, _ in found),
        latencies=tuple(end - begin for begin, end in spans),
    )
