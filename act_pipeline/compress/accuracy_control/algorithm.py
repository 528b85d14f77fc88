"""Accuracy control: revert ops to float, those that cost most accuracy first, until a model is within the limits.

The limits are ``Strategy.max_drop`` and ``Strategy.min_agreement``. The ops are ranked on training images
(`compress.accuracy_control.ranker`). Before every step, the first ops of the ranking are tried one at a time: each is
reverted in the current INT8 model and run in the evaluation engine. The op whose reversion brings the detections
nearest to the float model's is chosen. NNCF's ``quantize_with_accuracy_control`` also reverts op by op, but chooses on
the images that it evaluates on.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from act_pipeline.compress.accuracy_control.ranker import Ranker
from act_pipeline.compress.accuracy_control.revert import (
    dequantized,
    dequantized_ops,
    read_thresholds,
    revert_to_float,
)
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.progress import each
from act_pipeline.evaluation.act_candidates import FloatOp

# Number of top-ranked ops that are tried before a step, and number of images that they are compared on.
_SHORTLIST = 3
_TRIAL_IMAGES = 12
# Number of steps that revert one op; after that each step reverts twice as many ops as the one before.
_SINGLE_STEPS = 4


def control_accuracy(job: Job, candidate: Candidate, limit: Optional[int] = None) -> Candidate:
    """Revert as few ops of a candidate to float as it takes to be within the limits.

    Args:
        job: the compression; the new candidates are added to it.
        candidate: an INT8 model that is not within the limits.
        limit: the largest number of ops to revert; None: all but one.

    Returns:
        The first model found within the limits, with the number of ops of the last step reduced by bisection. If none
        is, the best one, which may be ``candidate``; see :meth:`Candidates.meets` and :meth:`Candidates.rank`.
    """
    return _AccuracyControl(job, candidate).run(limit)


class _AccuracyControl:
    """State of one accuracy control: the ranking of the ops and the ops reverted so far."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.clock = time.perf_counter()
        model, ops = candidate.source, candidate.selection.ops
        if model is None:
            model = dequantized(candidate.model, job.folder("dequantized") / "float")
            ops = dequantized_ops(candidate.model, ops)
        thresholds = read_thresholds(candidate.model)
        # Training does not quantize the op types that QuantAware does not list; these ops have no thresholds.
        weight_only, int8 = set(candidate.selection.weight_only), set(candidate.selection.int8)
        ops = tuple(op for op in ops if op.name in weight_only or set(thresholds).issuperset(op.activations))
        if candidate.name not in job.rankings:
            quantized = [op for op in ops if op.name in int8]
            job.rankings[candidate.name] = Ranker(job, candidate, model, quantized, thresholds)
        self.ranker: Ranker = job.rankings[candidate.name]
        self.ranker.restart()
        self.reverted: list[FloatOp] = []
        self.best = candidate

    def run(self, limit: Optional[int]) -> Candidate:
        try:
            return self._run(limit)
        finally:
            self.ranker.close()

    def _run(self, limit: Optional[int]) -> Candidate:
        # At least one op has to remain in INT8.
        most = min(len(self.ranker.ops) - 1, len(self.ranker.ops) if limit is None else limit)
        step, size = 0, 1
        while len(self.reverted) < most:
            size = min(size, most - len(self.reverted))
            chosen = self._next(size)
            made = self._without(chosen)
            if self.job.tried.meets(made):
                return self._fewest(chosen, made)
            self.reverted = list(made.reverted)
            self.ranker.remove(chosen)
            step += 1
            size = 1 if step < _SINGLE_STEPS else size * 2
        return self.best

    def _next(self, size: int) -> list[str]:
        """Return the names of the next ``size`` ops to revert."""
        shortlist = self.ranker.foremost(max(_SHORTLIST, size))
        if len(shortlist) <= size:
            return shortlist
        if size > 1:  # with several ops in a step, the order within the shortlist matters less than a trial costs
            return shortlist[:size]
        reverted = [op.output for op in self.reverted]
        changes = []
        for name in each(shortlist, "revert to float", "op", shown=self.job.progress):
            with tempfile.TemporaryDirectory(dir=self.job.work) as folder:
                target = Path(folder, "tried")
                tried = self._reverted_model([*reverted, name], target)
                changes.append(self.job.held_out.change(tried, _TRIAL_IMAGES))
        return [shortlist[int(np.argmin(changes))]]

    def _reverted_model(self, names: Sequence[str], directory: Path) -> InferenceModel:
        """Write the candidate with ``names`` in float; weights whose rounding hardly costs anything stay in INT8."""
        source = self.candidate.source  # without it, all weights stay in INT8
        smaller = self.ranker.with_int8_weights(names) if source is not None else ()
        return revert_to_float(self.candidate.model, names, directory, source, int8_weights=smaller)

    def _without(self, chosen: Sequence[str]) -> Candidate:
        """Return the candidate with ``chosen`` and all previously reverted ops in float, evaluated and recorded."""
        job, candidate = self.job, self.candidate
        names = [*(op.output for op in self.reverted), *chosen]
        selection = candidate.selection.revert_to_float(names, f"reverted to float for {job.tried.limits}")
        model = self._reverted_model(names, job.folder("mixed"))
        inventory = inventory_of(model, job.config.op_types, job.config.op_section, selection)
        made = Candidate(
            f"{candidate.name}, {len(names)} float",
            "mixed",
            model,
            candidate.source,
            selection,
            inventory,
            candidate.details,
            {"give_back": time.perf_counter() - self.clock},
            note=f"{len(names)} ops reverted to float",
        )
        job.tried.add(made)
        self.clock = time.perf_counter()
        added = [
            FloatOp(
                op.name, op.type, op.module, op.group,
                sensitivity=self.ranker.detection_change(op.name),
                map_after=made.map if job.tried.has_map else None,
            )
            for op in selection.ops if op.name in chosen
        ]  # fmt: skip
        made.reverted = [*self.reverted, *added]
        worse = made
        if job.tried.rank(made) > job.tried.rank(self.best) or job.tried.meets(made):
            worse, self.best = self.best, made
        if worse is not candidate:
            shutil.rmtree(worse.model.directory, ignore_errors=True)
        return made

    def _fewest(self, last: Sequence[str], made: Candidate) -> Candidate:
        """Return the candidate with the fewest ops of the last step in float that is within the limits, by bisection.

        Args:
            last: the ops of the last step, in the order of the ranking.
            made: the candidate with all of them reverted, which is within the limits.
        """
        enough, too_few = len(last), 0
        while enough - too_few > 1:
            count = (enough + too_few) // 2
            fewer = self._without(last[:count])
            if self.job.tried.meets(fewer):
                enough, made = count, fewer
            else:
                too_few = count
        return made
