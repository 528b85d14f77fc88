"""Measurements of the model that a compression saves: latency, and mAP in the reference engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Optional

from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.judging.judge import REFERENCE, Judge
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.command_names import name_commands
from act_pipeline.core.errors import UserError
from act_pipeline.core.timing import timed
from act_pipeline.engines import find_support
from act_pipeline.evaluation import compare_on_some
from act_pipeline.evaluation.act_measurements import ImageLatency, LatencyPair, ReferenceCheck

_logger = logging.getLogger(__name__)
# Images of the eval split, from the first on: the reference takes 0.2 s an image for RT-DETR-R18 at 640 on two cores.
REFERENCE_IMAGES = 64


@dataclass
class Measured:
    """Measurements of the saved INT8 model.

    Attributes:
        latency: latencies of the float and the INT8 model. None: nothing was evaluated.
        reference: the evaluation in the reference engine. None: the evaluation engine is the reference, the images
            have no labels, or the reference cannot run here.
        seconds: stage -> seconds.
    """

    latency: Optional[LatencyPair] = None
    reference: Optional[ReferenceCheck] = None
    seconds: dict[str, float] = field(default_factory=dict)


def measure_chosen(job: Job, chosen: Candidate, model: InferenceModel) -> Measured:
    """Measure latencies of the float and the INT8 model in turns, and evaluate the INT8 model in the reference engine.

    Args:
        job: the compression.
        chosen: the candidate that is saved.
        model: the original float model.
    """
    measured = Measured()
    if job.fp32 is None or chosen.evaluation is None:
        return measured
    with timed(measured.seconds, "latency"):
        found, rounds = job.judge.latencies({"fp32": (model, "fp32"), "int8": (chosen.model, "int8")}, job.reader)
    fp32, int8 = (
        ImageLatency(found[label].latency_ms["p50"], found[label].latency_ms["p90"]) for label in ("fp32", "int8")
    )
    measured.latency = LatencyPair(rounds, fp32, int8, found["int8"].ratio)
    # Without labels there is no mAP to compare the engines by.
    if job.tried.has_map and not job.judge.is_reference and find_support(REFERENCE, "int8", "CPU").available:
        with timed(measured.seconds, "reference"):
            measured.reference = _reference(job, chosen)
    return measured


def _reference(job: Job, chosen: Candidate) -> Optional[ReferenceCheck]:
    """Evaluate the INT8 model in the reference engine; warn if the difference of the engines is significant."""
    judge = Judge(REFERENCE, REFERENCE, "CPU", "", job.judge.decoder)
    try:
        found = judge.evaluate(chosen.model, "int8", job.reader, job.progress, REFERENCE_IMAGES)
    except UserError as error:
        _logger.warning("%s cannot run the INT8 model: %s", REFERENCE, error)
        return None
    assert chosen.evaluation is not None
    difference = compare_on_some(chosen.evaluation, found, job.tried.truth)
    if difference is None:
        return ReferenceCheck(REFERENCE, found.images, found.map)
    if difference.low > 0 or difference.high < 0:
        why = "the loss is of one runtime; "
        if difference.high < 0:
            why = "it also rounds with zero points, which TensorRT cannot: that one computes as int8_reference does; "
        _logger.warning(
            "%s gives the INT8 model %+.4f mAP compared with %s (%+.4f to %+.4f with 95%%, %d images): %s"
            + name_commands("`deploy/infer_eval.py --engine=all` shows all of them"),
            job.judge.engine, -difference.difference, REFERENCE, -difference.high, -difference.low, found.images, why,
        )  # fmt: skip
    judged_map = found.map - difference.difference
    return ReferenceCheck(REFERENCE, found.images, found.map, judged_map, -difference.high, -difference.low)
