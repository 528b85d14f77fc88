"""Take back ops that stay float by default: their groups are tried in INT8 where a model has met the limits without.

The defaults of `graph.float_by_default` are right for most models, not for all. Each group (one reason) is tried in
INT8, with the groups that were taken before it, on the held-out training images. It is taken if the detections change
no more than those of a calibration that counts as nearly the best. The scales are those of the same calibration.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence

from act_pipeline.compress.accuracy_control.residuals import round_residuals
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.ptq.quantizer import Calibration, PostTraining
from act_pipeline.compress.result.candidate_details import TakenBackDetails, TriedGroup
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.errors import UserError
from act_pipeline.core.timing import timed
from act_pipeline.graph.float_by_default import MAY_BE_INT8


def spare_ops(selection: Selection) -> list[str]:
    """Return the names of the ops that may be taken back."""
    return [name for names in _groups(selection).values() for name in names]


def take_back(
    job: Job, candidate: Candidate, post: PostTraining, algo: CalibrationAlgorithm, change: float, allowed: float
) -> Candidate:
    """Compute groups of ops in INT8 that stay float by default, where that costs no more than is allowed.

    Args:
        job: the compression; the new candidate, if there is one, is added to it.
        candidate: a calibrated model within the limits. What was tried is noted in its details.
        post: its calibration, with the ops of :func:`spare_ops`.
        algo: its calibration algorithm.
        change: the change of its detections on the held-out images, see :meth:`HeldOut.change`.
        allowed: the largest change that is allowed.

    Returns:
        The candidate with the groups in INT8 if it is within the limits; else ``candidate``.
    """
    groups = _groups(candidate.selection)
    if not groups:
        return candidate
    seconds: dict[str, float] = {}
    taken: list[str] = []
    found: list[TriedGroup] = []
    best: Calibration | None = None
    with timed(seconds, "take_back"):
        for reason, names in groups.items():
            written = post.write(job.folder("taken_back"), algo, [*taken, *names])
            group = TriedGroup(MAY_BE_INT8[reason], tuple(names), _change(job, written), allowed)
            found.append(group)
            job.say(group.line(change))
            worse: Calibration | None = written
            if group.taken:
                taken += names
                worse, best = best, written
            if worse is not None:
                shutil.rmtree(worse.model.directory)
    details = TakenBackDetails(change, allowed, len(job.held_out.feeds), tuple(found))
    if best is None:
        candidate.seconds.update(seconds)
        candidate.details = dataclasses.replace(candidate.details, taken_back=details)
        return candidate
    if candidate.details.residuals is not None and candidate.details.residuals.rounded:
        model, _ = round_residuals(best.model, job.folder("rounded"))
        best = dataclasses.replace(best, model=model)
    made = job.tried.add(_candidate(candidate, best, taken, seconds))
    details = dataclasses.replace(details, within_limits=job.tried.meets(made))
    for each in (candidate, made):
        each.details = dataclasses.replace(each.details, taken_back=details)
    return made if details.within_limits else candidate


def _change(job: Job, written: Calibration) -> float:
    """Return the change of the detections on the held-out images; 1, the largest, where the model cannot run."""
    try:
        return job.held_out.change(written.model)
    except UserError:  # the model without the group runs
        return 1.0


def _groups(selection: Selection) -> dict[str, list[str]]:
    """Return reason -> ops that stay float for it, although the config does not say so."""
    found: dict[str, list[str]] = {}
    for name in selection.by_default:
        if selection.kept[name] in MAY_BE_INT8:
            found.setdefault(selection.kept[name], []).append(name)
    return found


def _candidate(
    candidate: Candidate, calibration: Calibration, taken: Sequence[str], seconds: dict[str, float]
) -> Candidate:
    details = candidate.details.calibration
    assert details is not None
    details = dataclasses.replace(
        details, corrected_biases=calibration.corrected_biases, zero_tensors=calibration.zero_tensors
    )
    return Candidate(
        f"{candidate.name}, {len(taken)} taken back",
        candidate.strategy,
        calibration.model,
        candidate.source,
        candidate.selection.take_back(taken),
        calibration.inventory,
        dataclasses.replace(candidate.details, calibration=details),
        seconds,
        note=f"{len(taken)} ops in INT8 that stay float by default",
    )
