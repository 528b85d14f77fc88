"""Calibrated candidates: of the float model, smoothed or not, by the config's algorithm or by the best of all.

Where factors between ops cost nothing at inference (cross-layer equalization, and LayerNorms that only matmuls read),
`auto` compares the model with them and without on held-out training images (:func:`compared_with_equalized`). Both are
calibrated in one run of the calibration images: the factors are searched before, and what they divide is observed both
ways.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from act_pipeline.calibration.algorithms import ALGORITHMS
from act_pipeline.calibration.feeds import feeds_of
from act_pipeline.calibration.images import calibration_batches
from act_pipeline.compress.accuracy_control.residuals import round_residuals
from act_pipeline.compress.accuracy_control.revert import rescaled
from act_pipeline.compress.accuracy_control.take_back import spare_ops, take_back
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.ptq.quantizer import Calibration, PostTraining
from act_pipeline.compress.result.candidate_details import (
    CalibrationDetails,
    CandidateDetails,
    EqualizationDetails,
    ResidualDetails,
    SmoothQuantDetails,
)
from act_pipeline.compress.smooth_quant.algorithm import smooth_model
from act_pipeline.compress.smooth_quant.groups import DividedTensor
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.progress import each
from act_pipeline.core.timing import timed
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph

# `auto` tries calibrations whose change of the held-out detections is at most this many times the least one: some 30
# images cannot rank what is closer. None of them costs anything at inference, unlike the steps that follow.
_NEARLY_BEST = 1.15
# Algorithms that run on all held-out images; the first images choose them.
_FINALISTS = 3
# Equalization comes first only where the held-out detections change by at most this many times what they do without.
_CLEARLY_BETTER = 0.95
# Algorithms that the equalized model is compared with, the best ones of the model without: each takes seconds.
_EQUALIZED_ALGORITHMS = 2


@dataclass(frozen=True)
class FloatModel:
    """A float model to calibrate.

    Attributes:
        strategy: ``ptq`` or ``smooth_quant``.
        model: the model, smoothed or not.
        selection: the ops to quantize.
        smoothing: how it was smoothed; None: it is not.
        divided: the tensors of the original model that have other values in this one, where no op was inserted.
    """

    strategy: str
    model: InferenceModel
    selection: Selection
    smoothing: SmoothQuantDetails | None = None
    divided: Mapping[str, DividedTensor] = field(default_factory=dict)

    @property
    def smoothed(self) -> int:
        """The number of groups with factors."""
        return self.smoothing.smoothed if self.smoothing else 0


@dataclass(frozen=True)
class Compared:
    """A calibrated float model, whose algorithms were compared on the held-out training images.

    Attributes:
        source: the float model.
        post: its calibration.
        changes: algorithm -> change of the detections, see :meth:`HeldOut.changes`.
        seconds: stage -> seconds, for the first candidate.
        equalization: the comparison with factors and without, for ``act.json``; None: there are no factors.
    """

    source: FloatModel
    post: PostTraining
    changes: dict[CalibrationAlgorithm, float]
    seconds: dict[str, float]
    equalization: EqualizationDetails | None = None

    @property
    def least(self) -> float:
        """The least change."""
        return min(self.changes.values())


def unchanged(job: Job) -> FloatModel:
    """Return the float model as it is."""
    return FloatModel("ptq", job.model, job.selection)


def smoothed(job: Job, free_only: bool = False) -> FloatModel:
    """Return the smoothed float model; it is unchanged if nothing was smoothed.

    Args:
        job: the compression.
        free_only: only with factors that cost no time at inference.
    """
    seconds: dict[str, float] = {}
    settings, smooth_quant = job.config.quant_post, job.config.smooth_quant
    batches = calibration_batches(
        job.reader, settings, job.progress, stage="smooth", most=min(settings.images, smooth_quant.calib_images)
    )
    with timed(seconds, "smooth"):
        found = smooth_model(
            job.model,
            feeds_of(job.config, job.model, batches),
            job.folder("smoothed"),
            smooth_quant,
            algo=settings.algo,
            hist_percent=settings.hist_percent,
            device=job.device,
            exclude=[*job.selection.kept, *job.selection.weight_only],
            free_only=free_only,
            where=str(job.config.global_.model_dir),
        )
    details = SmoothQuantDetails(
        layers=[dataclasses.asdict(layer) for layer in found.layers],
        smoothed=len(found.smoothed),
        images=found.images,
        difference=found.difference,
        seconds=round(seconds["smooth"], 2),
    )
    if not found.smoothed:
        return FloatModel("smooth_quant", job.model, job.selection, details)
    # The names of the ops do not change, but some read a different tensor now.
    with contextlib.closing(StaticGraph.load(found.model)) as graph:
        ops = quantizable_ops(graph, job.config.op_types)
    selection = dataclasses.replace(job.selection, ops=tuple(ops))
    return FloatModel("smooth_quant", found.model, selection, details, found.divided)


def calibrated(job: Job, source: FloatModel) -> Candidate:
    """Return a candidate by calibration with ``QuantPost.algo``, and ``QuantPost.round_residuals``."""
    post = _calibrate(job, source)
    made = _made(job, source, post, job.config.quant_post.algo, {}, _stages(source, post))
    if job.config.quant_post.round_residuals:
        model, ops = round_residuals(made.model, job.folder("rounded"))
        made = dataclasses.replace(made, model=model, note="residual connections rounded" if ops else made.note)
    return job.tried.add(made)


def compared(job: Job, source: FloatModel) -> Compared:
    """Calibrate a float model, and compare all algorithms on the held-out images."""
    post = _calibrate(job, source, spare_ops(source.selection))
    seconds = _stages(source, post)
    with timed(seconds, "choose"):
        changes = _compare(job, post)
    return Compared(source, post, changes, seconds)


def compared_with_equalized(job: Job) -> tuple[list[Compared], FloatModel]:
    """Calibrate the float model with factors that cost nothing, and without, and compare both on the held-out images.

    Returns:
        Those that are nearly the best, the one with factors first only where that is clearly better; and the model with
        factors.
    """
    equal = smoothed(job, free_only=True)
    source = unchanged(job)
    post = _calibrate(job, source, spare_ops(source.selection), equal.divided)
    seconds = _stages(equal if equal.smoothing and equal.smoothing.layers else source, post)
    with timed(seconds, "choose"):
        plain = Compared(source, post, _compare(job, post), seconds)
        if not equal.smoothed:
            return [plain], equal
        other = post.equalized(equal.model, equal.selection)
        best = sorted(plain.changes, key=plain.changes.__getitem__)[:_EQUALIZED_ALGORITHMS]
        changes = _compare(job, other, best)
    details = EqualizationDetails(
        groups=equal.smoothed,
        change=min(changes.values()),
        without=plain.least,
        allowed=_CLEARLY_BETTER * plain.least,
        images=len(job.held_out.feeds),
    )
    job.say(details.line)
    pair = [Compared(source, post, plain.changes, {}, details), Compared(equal, other, changes, {}, details)]
    pair = pair[::-1] if details.kept else pair
    allowed = _NEARLY_BEST * min(found.least for found in pair)
    first, *others = [found for found in pair if found.least <= allowed]
    return [dataclasses.replace(first, seconds=seconds), *others], equal


def best_of(job: Job, found: Sequence[Compared]) -> Candidate:
    """Return the first candidate within the limits of several calibrated models, or else the best; see :func:`best`."""
    least = min(model.least for model in found)
    tried: list[Candidate] = []
    for model in found:
        tried.append(best(job, model, least))
        if job.tried.meets(tried[-1]):
            return tried[-1]
    return max(tried, key=job.tried.rank)


def best(job: Job, found: Compared, least: float) -> Candidate:
    """Return a candidate by the calibration algorithm that changes the detections least on held-out images.

    Where it is not within the limits, those that are nearly as good there are tried too: the first one within the
    limits is returned, with more ops in INT8 where that costs little, or else the best of them.

    Args:
        job: the compression.
        found: a calibrated model.
        least: the least change of all models that are tried.
    """
    changes, seconds, allowed = found.changes, found.seconds, _NEARLY_BEST * least
    tried: list[Candidate] = []
    for algo in sorted(changes, key=changes.__getitem__):
        if changes[algo] > allowed:
            break
        made = _made(job, found.source, found.post, algo, changes, {} if tried else seconds, found.equalization)
        rounded = _with_rounded_residuals(job, made, changes[algo], allowed)
        for candidate in [made] if rounded is None else [rounded, made]:
            tried.append(job.tried.add(candidate))
            if job.tried.meets(candidate):
                return take_back(job, candidate, found.post, algo, changes[algo], _NEARLY_BEST * found.least)
    return max(tried, key=job.tried.rank)


def _with_rounded_residuals(job: Job, candidate: Candidate, change: float, allowed: float) -> Candidate | None:
    """Return a candidate with residual connections of rounded maps; None where that is worse than is allowed.

    Args:
        job: the compression.
        candidate: the candidate. The comparison is noted in its details if nothing is returned; else its seconds are
            the new candidate's.
        change: the change of its detections on the held-out images.
        allowed: the largest change that is allowed.
    """
    seconds: dict[str, float] = {}
    folder = job.folder("rounded")
    with timed(seconds, "round_residuals"):
        model, ops = round_residuals(candidate.model, folder)
        if not ops:
            folder.rmdir()
            return None
        found = ResidualDetails(job.held_out.change(model), change, allowed, len(job.held_out.feeds), len(ops))
    job.say(found.line)
    details = dataclasses.replace(candidate.details, residuals=found)
    if not found.rounded:
        shutil.rmtree(folder)
        candidate.details = details
        candidate.seconds.update(seconds)
        return None
    seconds, candidate.seconds = {**candidate.seconds, **seconds}, {}
    return dataclasses.replace(
        candidate, model=model, details=details, seconds=seconds, note="residual connections rounded"
    )


def _calibrate(
    job: Job, source: FloatModel, spare: Sequence[str] = (), divided: Mapping[str, DividedTensor] | None = None
) -> PostTraining:
    """Run the calibration images through a float model; see :class:`PostTraining` for ``spare`` and ``divided``."""
    batches = calibration_batches(job.reader, job.config.quant_post, job.progress)
    return PostTraining(source.model, job.config, batches, job.device, source.selection, spare, divided)


def _stages(source: FloatModel, post: PostTraining) -> dict[str, float]:
    """Return the seconds of the stages that all algorithms share."""
    return {**({"smooth": source.smoothing.seconds} if source.smoothing else {}), **post.seconds}


def _made(
    job: Job,
    source: FloatModel,
    post: PostTraining,
    algo: CalibrationAlgorithm,
    changes: dict[CalibrationAlgorithm, float],
    seconds: dict[str, float],
    equalization: EqualizationDetails | None = None,
) -> Candidate:
    """Write the candidate of a calibration algorithm.

    Args:
        job: the compression.
        source: the float model.
        post: its calibration.
        algo: the algorithm.
        changes: the change of the held-out detections by algorithm, see :meth:`HeldOut.change`; empty: not compared.
        seconds: stage -> seconds, of what came before.
        equalization: the comparison with factors and without; None: there was none.
    """
    calibration = post.written.get(algo) or post.write(job.folder(source.strategy), algo)
    details = CandidateDetails(
        _calibration_details(job, algo, calibration, changes), source.smoothing, equalization=equalization
    )
    return Candidate(
        f"{source.strategy}:{algo}",
        source.strategy,
        calibration.model,
        source.model,
        source.selection,
        calibration.inventory,
        details,
        {**seconds, "quantize": calibration.seconds["quantize"]},
    )


def _calibration_details(
    job: Job,
    algo: CalibrationAlgorithm,
    calibration: Calibration,
    changes: dict[CalibrationAlgorithm, float],
) -> CalibrationDetails:
    settings = job.config.quant_post
    return CalibrationDetails(
        algo=algo,
        hist_percent=settings.hist_percent if algo == "hist" else None,
        images=calibration.images,
        images_asked=settings.images,
        seed=settings.seed,
        bias_correction=settings.bias_correction,
        corrected_biases=calibration.corrected_biases,
        zero_tensors=calibration.zero_tensors,
        compared=changes,
        compared_images=len(job.held_out.feeds) if changes else None,
    )


def _compare(
    job: Job, post: PostTraining, algorithms: Collection[CalibrationAlgorithm] | None = None
) -> dict[CalibrationAlgorithm, float]:
    """Return algorithm -> the change of the detections on the held-out images, of the best: see `HeldOut.changes`."""
    folder = job.folder("compared")
    algorithms = ALGORITHMS if algorithms is None else algorithms
    first = next(iter(algorithms))
    post.written[first] = post.write(folder, first)
    written = post.written[first].model

    def models() -> Iterator[tuple[CalibrationAlgorithm, InferenceModel]]:
        for algo in each(algorithms, "choose", "algorithm", shown=job.progress):
            with tempfile.TemporaryDirectory(dir=folder) as other:
                yield algo, rescaled(written, post.thresholds(algo), Path(other))

    return job.held_out.changes(models(), _FINALISTS)
