"""Accuracy control: ops go back to float, the costliest first, until the INT8 model is within ``max_drop``.

Which op costs most is measured on training images (`compress.accuracy_control.ranker`). Before every step the foremost
ops are tried: each one alone goes back to float in the INT8 model as it then is, in the engine that evaluates, and the
one that brings the detections nearest to the float model's is taken. NNCF's ``quantize_with_accuracy_control`` works
the same way, op by op; it chooses on the images that it is evaluated on.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.accuracy_control.ranker import Ranker
from act_pipeline.compress.accuracy_control.revert import (
    dequantized,
    dequantized_ops,
    read_thresholds,
    revert_to_float,
)
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.compress.plan.op_inventory import inventory_of

# Foremost ops that are tried before a step, and the images that they are compared on.
_SHORTLIST = 3
_TRIAL_IMAGES = 16
# So many steps of one op; then each step is twice the one before.
_SINGLE_STEPS = 4


def control_accuracy(job: Job, candidate: Candidate, limit: Optional[int] = None) -> Candidate:
    """Revert ops of a candidate to float until it is within ``max_drop``, as few as that takes.

    Args:
        job: the compression; what is tried is added to it.
        candidate: loses more than ``max_drop``.
        limit: revert so many ops at most; None: all but one, if need be.

    Returns:
        the best that was found; :meth:`Job.meets` tells whether it is within ``max_drop``.
    """
    return _AccuracyControl(job, candidate).run(limit)


class _AccuracyControl:
    """Ops going back to float, step by step."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.clock = time.perf_counter()
        model, ops = candidate.source, candidate.selection.ops
        if model is None:
            model = dequantized(candidate.model, job.folder("dequantized") / "float")
            ops = dequantized_ops(candidate.model, ops)
        thresholds = read_thresholds(candidate.model)
        # Training leaves in float what its QuantAware does not name.
        weight_only, int8 = set(candidate.selection.weight_only), set(candidate.selection.int8)
        ops = tuple(op for op in ops if op.name in weight_only or set(thresholds).issuperset(op.activations))
        if candidate.name not in job.rankings:
            quantized = [op for op in ops if op.name in int8]
            job.rankings[candidate.name] = Ranker(job, candidate, model, quantized, thresholds)
        self.ranker: Ranker = job.rankings[candidate.name]
        self.ranker.restart()
        self.reverted: list[dict[str, Any]] = []
        self.best = candidate

    def run(self, limit: Optional[int]) -> Candidate:
        try:
            return self._run(limit)
        finally:
            self.ranker.close()

    def _run(self, limit: Optional[int]) -> Candidate:
        # A model of which every op is float is no INT8 model.
        most = min(len(self.ranker.ops) - 1, len(self.ranker.ops) if limit is None else limit)
        step, size = 0, 1
        while len(self.reverted) < most:
            size = min(size, most - len(self.reverted))
            chosen = self._next(size)
            made = self._without(chosen)
            if self.job.meets(made):
                return self._fewest(chosen, made)
            self.reverted = made.record["given_back"]
            self.ranker.remove(chosen)
            step += 1
            size = 1 if step < _SINGLE_STEPS else size * 2
        return self.best

    def _next(self, size: int) -> list[str]:
        """Return the ops whose return to float brings the detections nearest to the float model's."""
        from tqdm import tqdm

        shortlist = self.ranker.foremost(max(_SHORTLIST, size))
        if len(shortlist) <= size:
            return shortlist
        if size > 1:  # trials cost too much for what many ops at once leave to choose
            return shortlist[:size]
        reverted = [entry["output"] for entry in self.reverted]
        changes = []
        for name in tqdm(shortlist, desc="revert to float", unit="op", disable=not self.job.progress, leave=False):
            with tempfile.TemporaryDirectory(dir=self.job.work) as folder:
                target = Path(folder, "tried")
                tried = revert_to_float(self.candidate.model, [*reverted, name], target, self.candidate.source)
                changes.append(self.job.change(tried, _TRIAL_IMAGES))
        return [shortlist[int(np.argmin(changes))]]

    def _without(self, chosen: Sequence[str]) -> Candidate:
        """Return the candidate with ``chosen`` in float too, evaluated and recorded."""
        job, candidate = self.job, self.candidate
        names = [*(entry["output"] for entry in self.reverted), *chosen]
        selection = candidate.selection.revert_to_float(names, f"given back for max_drop {job.max_drop}")
        model = revert_to_float(candidate.model, names, job.folder("mixed"), candidate.source)
        inventory = inventory_of(model, job.config.op_types, job.config.op_section, selection)
        made = Candidate(
            f"{candidate.name}, {len(names)} float",
            "mixed",
            model,
            candidate.source,
            selection,
            inventory,
            dict(candidate.record),
            {"give_back": time.perf_counter() - self.clock},
            note=f"{len(names)} ops given back to float",
        )
        job.add(made)
        self.clock = time.perf_counter()
        added = [
            {**entry, "sensitivity": self.ranker.detection_change(entry["output"]), "map_after": made.map}
            for entry in selection.describe(chosen)
        ]
        made.record["given_back"] = [*self.reverted, *added]
        worse = made
        if made.map > self.best.map or job.meets(made):
            worse, self.best = self.best, made
        if worse is not candidate:
            shutil.rmtree(worse.model.directory, ignore_errors=True)
        return made

    def _fewest(self, last: Sequence[str], made: Candidate) -> Candidate:
        """Return the least part of the last step that is enough, by bisection; ``made`` has all of it."""
        enough, too_few = len(last), 0
        while enough - too_few > 1:
            count = (enough + too_few) // 2
            fewer = self._without(last[:count])
            if self.job.meets(fewer):
                enough, made = count, fewer
            else:
                too_few = count
        return made
