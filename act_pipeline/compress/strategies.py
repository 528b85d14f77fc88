"""The strategies: ``ptq``, ``smooth_quant``, ``qat_dis``, and ``auto``, which tries them in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from act_pipeline.calibration.feeds import training_reader
from act_pipeline.calibration.images import calibration_batches
from act_pipeline.compress.accuracy_control.algorithm import control_accuracy
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.calibrating import (
    best_of,
    calibrated,
    compared,
    compared_with_equalized,
    smoothed,
    unchanged,
)
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.qat.detection_loss import unaligned_rows
from act_pipeline.compress.qat.distributed.remote_training import call_followers
from act_pipeline.compress.qat.int8_snapshots import Scorer
from act_pipeline.compress.qat.trainer import train
from act_pipeline.compress.qat.training import Training
from act_pipeline.compress.qat.zero_points import zero_points_of
from act_pipeline.compress.result.candidate_details import (
    CandidateDetails,
    TrainingDetails,
    TrainingPoint,
)
from act_pipeline.config.sections import WeightedOp
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.timing import timed
from act_pipeline.data.model_fit import log_notes

_WEIGHTED: dict[str, WeightedOp] = {name: name for name in get_args(WeightedOp)}
# SmoothQuant adds multiplications, so `auto` goes on with its model only if that removes more than this share of the
# loss of accuracy.
_SMOOTHING_GAIN = 0.1
# `auto` reverts at most this share of the ops to float before it trains.
_MIXED_SHARE = 0.1
# Images of the calibration that `qat_dis` starts from; its scales are the start of the training's moving averages.
_SCALE_IMAGES = 16


def ptq(job: Job) -> Candidate:
    """Calibrate by the config's algorithm, then revert ops to float if the model is not within the limits.

    Args:
        job: the compression; candidates are added to it.

    Returns:
        The candidate to save: within the limits (``max_drop``, ``min_agreement``), or the best one.
    """
    return _within_limits(job, calibrated(job, unchanged(job)))


def smooth_quant(job: Job) -> Candidate:
    """Move outliers of activations into weights, then proceed as :func:`ptq`, with the same argument and result."""
    return _within_limits(job, calibrated(job, smoothed(job)))


def qat_dis(job: Job) -> Candidate:
    """Train with distillation, then revert ops to float if the model is not within the limits.

    Args and result are those of :func:`ptq`.
    """
    return _within_limits(job, _trained(job))


def auto(job: Job) -> Candidate:
    """Try strategies, the cheapest first, until a candidate is within the limits.

    The order is: calibration by the best of all algorithms, or one that is nearly as good, with the channels equalized
    where that is clearly better or is needed and costs no time at inference; SmoothQuant with such a calibration; at
    most a tenth of the ops in float; training if the config has its sections; any number of ops in float. Where one of
    the first two is enough, ops that stay float by default are tried in INT8 (`take_back`). Without limits the first
    calibration is the result.

    Args and result are those of :func:`ptq`.
    """
    found, equalized = compared_with_equalized(job)
    candidate = best_of(job, found)
    if job.tried.meets(candidate):
        return candidate
    job.tried.announce("SmoothQuant, because calibration alone loses too much: it moves outliers into weights")
    more = smoothed(job)
    if more.smoothed > equalized.smoothed:
        smooth = best_of(job, [compared(job, more)])
        if job.tried.meets(smooth):
            return smooth
        if job.tried.gains(smooth, candidate, _SMOOTHING_GAIN):
            candidate = smooth
    job.tried.announce(
        f"{candidate.name} with at most a tenth of its ops reverted to float, the most sensitive ones first"
    )
    mixed = control_accuracy(job, candidate, int(_MIXED_SHARE * len(candidate.selection.ops)))
    if job.tried.meets(mixed):
        return mixed
    if job.config.trains:
        job.tried.announce(f"training with distillation, from the scales of {candidate.name}")
        trained = _trained(job, candidate)
        if job.tried.meets(trained):
            return trained
        candidate = max(candidate, trained, key=job.tried.rank)
    return _within_limits(job, candidate)


STRATEGIES: dict[str, Callable[[Job], Candidate]] = {
    "auto": auto,
    "ptq": ptq,
    "smooth_quant": smooth_quant,
    "qat_dis": qat_dis,
}


def _within_limits(job: Job, candidate: Candidate) -> Candidate:
    """Return a candidate, with ops reverted to float until it is within the limits; the best one if that fails."""
    if job.tried.meets(candidate):
        return candidate
    job.tried.announce(f"{candidate.name} with ops reverted to float, as many as it takes")
    found = control_accuracy(job, candidate)
    return found if job.tried.meets(found) else job.tried.best()


def _trained(job: Job, start_from: Candidate | None = None) -> Candidate:
    """Return a candidate by training.

    Args:
        job: the compression.
        start_from: the candidate whose scales and biases the training starts from; None: a short calibration, or
            PaddleSlim's start if nothing is evaluated.
    """
    seconds: dict[str, float] = {}
    start = _training_start(job, start_from, seconds)
    note = unaligned_rows(job.config, job.model)
    log_notes([note] if note else [])
    with timed(seconds, "train"):
        training = _train(job, start.model)
    seconds["train"] += training.earlier_seconds
    if training.stopped:
        log_notes([f"the training ended after {training.iterations} iterations: {training.stopped}"])
    model = training.model
    chosen = job.selection
    if chosen.weight_only:
        model = revert_to_float(model, chosen.weight_only, job.folder("weight_only"), dynamic=chosen.dynamic)
    inventory = inventory_of(model, job.config.op_types, job.config.op_section, job.selection)
    details = CandidateDetails(training=_training_details(job, training, start))
    return job.tried.add(Candidate("qat_dis", "qat_dis", model, None, job.selection, inventory, details, seconds))


@dataclass(frozen=True)
class _Start:
    """What the scales and biases of a training start from.

    Attributes:
        name: for ``act.json``; None: PaddleSlim's start.
        model: the INT8 model; None: PaddleSlim's start, or the checkpoint has the scales.
    """

    name: str | None
    model: InferenceModel | None


def _training_start(job: Job, start_from: Candidate | None, seconds: dict[str, float]) -> _Start:
    if start_from is not None:
        return _Start(start_from.name, start_from.model)
    if job.fp32 is None:
        return _Start(None, None)
    name = f"ptq:avg, {_SCALE_IMAGES} images"
    if job.checkpoints.resumed is not None:
        return _Start(name, None)
    with timed(seconds, "calibrate"):
        return _Start(name, _calibrated_start(job))


def _calibrated_start(job: Job) -> InferenceModel:
    """Return an INT8 model calibrated on a few images, whose scales and biases the training starts from."""
    types = [_WEIGHTED[name] for name in job.config.training.quant_aware.quantize_op_types if name in _WEIGHTED]
    settings = dataclasses.replace(
        job.config.quant_post, quantize_op_types=types, calib_images=_SCALE_IMAGES, batch_nums=None
    )
    config = dataclasses.replace(job.config, quant_post=settings)
    batches = calibration_batches(job.reader, settings, job.progress)
    return PostTraining(job.model, config, batches, job.device, job.selection).write(job.folder("start"), "avg").model


def _train(job: Job, start: InferenceModel | None) -> Training:
    """Train on all ranks, and score INT8 models if the float model was evaluated."""
    config, fp32 = job.config, job.fp32
    has_origin = fp32 is not None and fp32.has_map and config.training.train_config.origin_metric is not None
    loader = job.ranks.shard(training_reader(config, job.reader).loader("train"))
    scorer = Scorer(
        lambda model: 1 - job.held_out.change(model),
        lambda model: job.judge.evaluate(model, "int8", job.reader, job.progress).map,
        job.judge.survives_nan,
    )
    # An engine without zero points has to judge, and probably runs, weights that are trained for its own rounding.
    lowest = zero_points_of(start if job.judge.has_zero_points else None, job.checkpoints)
    call_followers(job.ranks, job.model, lowest)
    return train(
        job.model,
        config,
        loader,
        scorer if fp32 is not None else None,
        job.folder("qat_dis"),
        device=job.device,
        origin_metric=fp32.map if fp32 is not None and has_origin else None,
        progress=job.progress,
        checkpoints=job.checkpoints,
        interruption=job.interruption,
        start=start,
        lowest=lowest,
        ranks=job.ranks,
    )


def _training_details(job: Job, training: Training, start: _Start) -> TrainingDetails:
    return TrainingDetails(
        iterations=training.iterations,
        evaluations=[TrainingPoint(iteration, agreement) for iteration, agreement in training.evaluations],
        loss=[round(loss, 6) for _, loss in training.losses],
        stopped=training.stopped,
        scales_from=start.name,
        held_out_images=len(job.held_out.feeds) if job.fp32 is not None else 0,
    )
