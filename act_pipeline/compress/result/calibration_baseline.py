"""What the INT8 model detects on its calibration images, and how many of its activations are clipped there.

A server compares requests with both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from act_pipeline.compress.job import Job
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.engines.onnx_runtimes.range_probe import RangeProbe, probe_runtime, write_model_probe
from act_pipeline.evaluation.batches import NotFinite
from act_pipeline.families.interface import PROMPTS

# So many of the calibration images at most, so that it takes seconds.
MOST_IMAGES, MOST_RANGE_IMAGES = 64, 16


@dataclass(frozen=True)
class CalibrationBaseline:
    """Figures of the INT8 model on calibration images.

    Attributes:
        images: number of images.
        rows: float64 [M, 7] as ``Evaluation.detections``, with positions of the images and class indices.
        shares: tensor -> share of its elements beyond its range; empty: nothing here can tell it.
        range_images: number of images of ``shares``.
    """

    images: int
    rows: np.ndarray
    shares: Mapping[str, float]
    range_images: int


def calibration_baseline(job: Job, model: InferenceModel) -> Optional[CalibrationBaseline]:
    """Return the figures of an INT8 model on its calibration images; None: it is no detector of pictures alone.

    Args:
        job: the compression; the images are the first ones of its calibration.
        model: the INT8 model.
    """
    settings = job.config.quant_post
    count = min(settings.images, MOST_IMAGES)
    loader = job.reader.loader("train", batch_size=1, shuffle=False, drop_last=False, seed=settings.seed, images=count)
    with contextlib.closing(iter(loader)) as batches:
        feeds = list(batches)
    if not feeds or any(PROMPTS in feed for feed in feeds):
        return None
    job.say(f"detecting on {len(feeds)} calibration images, with which a server compares requests")
    try:
        rows = job.judge.detect(model, "int8", job.reader, feeds).rows
    except NotFinite:
        return None
    shares = _shares(model, feeds[:MOST_RANGE_IMAGES])
    return CalibrationBaseline(len(feeds), rows, shares, min(len(feeds), MOST_RANGE_IMAGES))


def _shares(model: InferenceModel, feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    runtime = probe_runtime()
    if runtime is None:
        return {}
    try:
        path, tensors = write_model_probe(model)
        probe = RangeProbe(path, runtime, available_cpus())
        found = np.mean([probe.run(feed) for feed in feeds], axis=0)
    except UserError:  # the server does without these figures, and so can a compression
        return {}
    return {name: float(share) for name, share in zip(tensors, found)}
