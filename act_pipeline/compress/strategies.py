"""The strategies: ``ptq``, ``smooth_quant``, ``qat_dis``, and ``auto``, which tries them in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from act_pipeline.calibration.algorithms import ALGORITHMS
from act_pipeline.calibration.feeds import feeds_of, training_reader
from act_pipeline.calibration.images import calibration_batches
from act_pipeline.compress.accuracy_control.algorithm import control_accuracy
from act_pipeline.compress.accuracy_control.revert import rescaled, revert_to_float
from act_pipeline.compress.candidate_details import (
    CalibrationDetails,
    CandidateDetails,
    SmoothQuantDetails,
    TrainingDetails,
    TrainingPoint,
)
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.ptq.quantizer import PostTraining
from act_pipeline.compress.qat.detection_loss import unaligned_rows
from act_pipeline.compress.qat.distributed.follower import call_followers
from act_pipeline.compress.qat.int8_snapshots import Scorer
from act_pipeline.compress.qat.trainer import train
from act_pipeline.compress.smooth_quant.algorithm import smooth_model
from act_pipeline.config.sections import CalibrationAlgorithm, WeightedOp
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.progress import each
from act_pipeline.core.timing import timed
from act_pipeline.data.model_fit import told
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph

_WEIGHTED: dict[str, WeightedOp] = {name: name for name in get_args(WeightedOp)}
# SmoothQuant adds multiplications, so `auto` goes on with its model only if that removes more than this share of the
# drop.
_SMOOTHING_GAIN = 0.1
# `auto` reverts at most this share of the ops to float before it trains.
_MIXED_SHARE = 0.1
# Images of the calibration that `qat_dis` starts from; its scales are the start of the training's moving averages.
_SCALE_IMAGES = 16


def ptq(job: Job) -> Candidate:
    """Calibrate by the config's algorithm, then revert ops to float if the drop exceeds ``max_drop``.

    Args:
        job: the compression; candidates are added to it.

    Returns:
        The candidate to save: within ``max_drop``, or the best one.
    """
    return _lifted(job, _calibrated(job, job.model, job.selection, "ptq"))


def smooth_quant(job: Job) -> Candidate:
    """Move outliers of activations into weights, then proceed as :func:`ptq`, with the same argument and result."""
    smoothed, selection, found = _smoothed(job)
    return _lifted(job, _calibrated(job, smoothed, selection, "smooth_quant", smoothing=found))


def qat_dis(job: Job) -> Candidate:
    """Train with distillation, then revert ops to float if the drop exceeds ``max_drop``.

    Args and result are those of :func:`ptq`.
    """
    return _lifted(job, _trained(job))


def auto(job: Job) -> Candidate:
    """Try strategies, the cheapest first, until a candidate is within ``max_drop``.

    The order is: calibration by the best of all algorithms, SmoothQuant, at most a tenth of the ops in float, training
    if the config has its sections, any number of ops in float.

    Args and result are those of :func:`ptq`.
    """
    candidate = _calibrated(job, job.model, job.selection, "ptq", choose=True)
    if job.meets(candidate):
        return candidate
    smoothed, selection, found = _smoothed(job)
    if found.smoothed:
        smooth = _calibrated(job, smoothed, selection, "smooth_quant", choose=True, smoothing=found)
        if job.meets(smooth):
            return smooth
        if job.drop(candidate) - job.drop(smooth) > _SMOOTHING_GAIN * job.drop(candidate):
            candidate = smooth
    mixed = control_accuracy(job, candidate, int(_MIXED_SHARE * len(candidate.selection.ops)))
    if job.meets(mixed):
        return mixed
    if job.config.trains:
        trained = _trained(job, candidate)
        if job.meets(trained):
            return trained
        candidate = max(candidate, trained, key=lambda found: found.map)
    return _lifted(job, candidate)


STRATEGIES: dict[str, Callable[[Job], Candidate]] = {
    "auto": auto,
    "ptq": ptq,
    "smooth_quant": smooth_quant,
    "qat_dis": qat_dis,
}


def _lifted(job: Job, candidate: Candidate) -> Candidate:
    if job.meets(candidate):
        return candidate
    found = control_accuracy(job, candidate)
    return found if job.meets(found) else job.best()


def _calibrated(
    job: Job,
    model: InferenceModel,
    selection: Selection,
    strategy: str,
    choose: bool = False,
    smoothing: SmoothQuantDetails | None = None,
) -> Candidate:
    """Return a candidate by calibration of ``model``.

    Args:
        job: the compression.
        model: the float model, smoothed or not.
        selection: the ops to quantize.
        strategy: ``ptq`` or ``smooth_quant``.
        choose: use the algorithm that changes the detections least, instead of ``QuantPost.algo``.
        smoothing: the transformation that made ``model``; None: it is not smoothed.
    """
    settings = job.config.quant_post
    batches = calibration_batches(job.reader, settings, job.progress)
    post = PostTraining(model, job.config, batches, job.device, selection)
    seconds = {"smooth": smoothing.seconds} if smoothing else {}
    algo: CalibrationAlgorithm = settings.algo
    compared: dict[CalibrationAlgorithm, float] = {}
    if choose:
        with timed(seconds, "choose"):
            compared = _compare(job, post)
            algo = min(compared, key=compared.__getitem__)
    calibration = post.write(job.folder(strategy), algo)
    seconds.update(calibration.seconds)
    described = CalibrationDetails(
        algo=algo,
        hist_percent=settings.hist_percent if algo == "hist" else None,
        images=calibration.images,
        images_asked=settings.images,
        seed=settings.seed,
        bias_correction=settings.bias_correction,
        corrected_biases=calibration.corrected_biases,
        zero_tensors=calibration.zero_tensors,
        compared=compared,
        compared_images=len(job.held_out) if compared else None,
    )
    return job.add(
        Candidate(
            f"{strategy}:{algo}",
            strategy,
            calibration.model,
            model,
            selection,
            calibration.inventory,
            CandidateDetails(described, smoothing),
            seconds,
        )
    )


def _compare(job: Job, post: PostTraining) -> dict[CalibrationAlgorithm, float]:
    """Return algorithm -> the change of the detections on the held-out training images, see :meth:`Job.change`."""
    found: dict[CalibrationAlgorithm, float] = {}
    folder = job.folder("compared")
    written = post.write(folder, next(iter(ALGORITHMS))).model
    for algo in each(ALGORITHMS, "choose", "algorithm", shown=job.progress):
        thresholds = post.thresholds(algo)
        with tempfile.TemporaryDirectory(dir=folder) as other:
            found[algo] = job.change(rescaled(written, thresholds, Path(other)))
    shutil.rmtree(folder)
    return found


def _smoothed(job: Job) -> tuple[InferenceModel, Selection, SmoothQuantDetails]:
    """Return the smoothed float model, the selection of its ops, and how it was smoothed."""
    seconds: dict[str, float] = {}
    settings = job.config.quant_post
    with timed(seconds, "smooth"):
        smoothed = smooth_model(
            job.model,
            feeds_of(job.config, job.model, calibration_batches(job.reader, settings, job.progress)),
            job.folder("smoothed"),
            job.config.smooth_quant,
            algo=settings.algo,
            hist_percent=settings.hist_percent,
            device=job.device,
            exclude=[*job.selection.kept, *job.selection.weight_only],
            where=str(job.config.global_.model_dir),
        )
    details = SmoothQuantDetails(
        layers=[dataclasses.asdict(layer) for layer in smoothed.layers],
        smoothed=len(smoothed.smoothed),
        images=smoothed.images,
        difference=smoothed.difference,
        seconds=round(seconds["smooth"], 2),
    )
    # The names of the ops do not change, but some read a different tensor now.
    with contextlib.closing(StaticGraph.load(smoothed.model)) as graph:
        ops = quantizable_ops(graph, job.config.op_types)
    selection = dataclasses.replace(job.selection, ops=tuple(ops))
    return smoothed.model, selection, details


def _calibrated_start(job: Job) -> InferenceModel:
    """Return an INT8 model calibrated on a few images, whose scales and biases the training starts from."""
    types = [_WEIGHTED[name] for name in job.config.training.quant_aware.quantize_op_types if name in _WEIGHTED]
    settings = dataclasses.replace(
        job.config.quant_post, quantize_op_types=types, calib_images=_SCALE_IMAGES, batch_nums=None
    )
    config = dataclasses.replace(job.config, quant_post=settings)
    batches = calibration_batches(job.reader, settings, job.progress)
    return PostTraining(job.model, config, batches, job.device, job.selection).write(job.folder("start"), "avg").model


def _trained(job: Job, start_from: Candidate | None = None) -> Candidate:
    """Return a candidate by training.

    Args:
        job: the compression.
        start_from: the candidate whose scales and biases the training starts from; None: a short calibration, or
            PaddleSlim's start if nothing is evaluated.
    """
    config = job.config
    seconds: dict[str, float] = {}
    loader = job.ranks.shard(training_reader(config, job.reader).loader("train"))
    scorer = Scorer(
        lambda model: 1 - job.change(model),
        lambda model: job.judge.evaluate(model, "int8", job.reader, job.progress).map,
        job.judge.survives_nan,
    )
    start, started_from = None, None
    if start_from is not None:
        start, started_from = start_from.model, start_from.name
    elif job.fp32 is not None:
        started_from = f"ptq:avg, {_SCALE_IMAGES} images"
        if job.checkpoints.resumed is None:  # a resumed training takes its scales from the checkpoint
            with timed(seconds, "calibrate"):
                start = _calibrated_start(job)
    note = unaligned_rows(config, job.model)
    told([note] if note else [])
    with timed(seconds, "train"):
        call_followers(job.ranks, job.model)
        training = train(
            job.model,
            config,
            loader,
            len(loader),
            scorer if job.fp32 is not None else None,
            job.folder("qat_dis"),
            device=job.device,
            origin_metric=job.fp32.map if job.fp32 and config.training.train_config.origin_metric is not None else None,
            progress=job.progress,
            checkpoints=job.checkpoints,
            interruption=job.interruption,
            start=start,
            ranks=job.ranks,
        )
    seconds["train"] += training.earlier_seconds
    if training.stopped:
        told([f"the training ended after {training.iterations} iterations: {training.stopped}"])
    details = TrainingDetails(
        iterations=training.iterations,
        evaluations=[TrainingPoint(iteration, agreement) for iteration, agreement in training.evaluations],
        loss=[round(loss, 6) for _, loss in training.losses],
        stopped=training.stopped,
        scales_from=started_from,
        held_out_images=len(job.held_out) if job.fp32 is not None else 0,
    )
    model = training.model
    if job.selection.weight_only:
        model = revert_to_float(model, job.selection.weight_only, job.folder("weight_only"))
    inventory = inventory_of(model, config.op_types, config.op_section, job.selection)
    made = CandidateDetails(training=details)
    return job.add(Candidate("qat_dis", "qat_dis", model, None, job.selection, inventory, made, seconds))
