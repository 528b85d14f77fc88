"""The floor of accuracy: ops go back to float, the one that costs most first, until an INT8 model is within
``max_drop``.

Which op costs most is measured on training images, from coarse to fine: blocks of neighbouring ops are quantized alone,
and the error of the outputs ranks them; then the ops of the worst block, one by one. Before every step, the foremost
ops are taken back one by one from the INT8 model as it then is, in the engine that judges, and the one whose return to
float brings the detections nearest to the float model's goes back. NNCF's ``quantize_with_accuracy_control`` walks the
same way, op by op, and chooses on the images that judge.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.sensitivity import BlockError, OpSensitivity, SensitivityRunner, Task, ranked
from act_pipeline.compress.accuracy_control.revert import dequantized, dequantized_ops, give_back, read_thresholds
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.execution.cpu_kernels import all_cores
from act_pipeline.graph.quantizable_ops import QuantizableOp

RANK_IMAGES = 1
# Foremost ops that are taken back for trial before a step.
_SHORTLIST = 3
# So many steps of one op; then each step is twice the one before.
_SINGLE_STEPS = 4


def lift(job: Job, candidate: Candidate, limit: Optional[int] = None) -> Candidate:
    """Give ops of a candidate back to float until it is within ``max_drop``, as few as that takes.

    Args:
        job: the compression; what is tried is added to it.
        candidate: below the floor.
        limit: give back so many ops at most; None: all but one, if need be.

    Returns:
        the best that was found; :meth:`Job.meets` tells whether it is within ``max_drop``.
    """
    return _Lift(job, candidate).run(limit)


class _Lift:
    """Ops going back to float, step by step."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.clock = time.perf_counter()
        self.model, self.ops = candidate.source, candidate.selection.ops
        if self.model is None:
            self.model = dequantized(candidate.model, job.folder("dequantized") / "float")
            self.ops = dequantized_ops(candidate.model, self.ops)
        self.thresholds = read_thresholds(candidate.model)
        # Training leaves in float what its QuantAware does not name.
        scaled, weight_only = set(self.thresholds), set(candidate.selection.weight_only)
        self.ops = tuple(op for op in self.ops if op.name in weight_only or scaled.issuperset(op.activations))
        int8 = set(candidate.selection.int8)
        if candidate.name not in job.rankings:
            quantized = [op for op in self.ops if op.name in int8]
            job.rankings[candidate.name] = _Ranking(job, candidate, self.model, quantized, self.thresholds)
        self.ranking: _Ranking = job.rankings[candidate.name]
        self.ranking.gone.clear()
        self.given: list[dict[str, Any]] = []
        self.best = candidate

    def run(self, limit: Optional[int]) -> Candidate:
        try:
            return self._run(limit)
        finally:
            self.ranking.close()

    def _run(self, limit: Optional[int]) -> Candidate:
        # A model of which every op is float is no INT8 model.
        left = min(len(self.ranking.ops) - 1, len(self.ranking.ops) if limit is None else limit)
        step, size = 0, 1
        while len(self.given) < left:
            size = min(size, left - len(self.given))
            chosen = self._next(size)
            made = self._without(chosen)
            if self.job.meets(made):
                return self._fewest(chosen, made)
            self.given = made.record["given_back"]
            self.ranking.remove(chosen)
            step += 1
            size = 1 if step < _SINGLE_STEPS else size * 2
        return self.best

    def _next(self, size: int) -> list[str]:
        """Return the ops whose return to float brings the detections nearest to the float model's."""
        from tqdm import tqdm

        shortlist = self.ranking.foremost(max(_SHORTLIST, size))
        if len(shortlist) <= size:
            return shortlist
        if size > 1:  # trials cost too much for what many ops at once leave to choose
            return shortlist[:size]
        given = [entry["output"] for entry in self.given]
        changes = []
        for name in tqdm(shortlist, desc="release", unit="op", disable=not self.job.progress, leave=False):
            with tempfile.TemporaryDirectory(dir=self.job.work) as folder:
                tried = give_back(self.candidate.model, [*given, name], Path(folder, "tried"), self.candidate.source)
                changes.append(self.job.change(tried))
        return [shortlist[int(np.argmin(changes))]]

    def _without(self, chosen: Sequence[str]) -> Candidate:
        """Return the candidate with ``chosen`` in float beside what has been given back, evaluated and noted."""
        job, candidate = self.job, self.candidate
        names = [*(entry["output"] for entry in self.given), *chosen]
        selection = candidate.selection.give_back(names, f"given back for max_drop {job.max_drop}")
        model = give_back(candidate.model, names, job.folder("mixed"), candidate.source)
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
            {**entry, "sensitivity": self.ranking.detection_change(entry["output"]), "map_after": made.map}
            for entry in selection.describe(chosen)
        ]
        made.record["given_back"] = [*self.given, *added]
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


class _Ranking:
    """Ops by what each costs alone, measured no further than the floor has come: block after block."""

    def __init__(
        self,
        job: Job,
        candidate: Candidate,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        thresholds: Mapping[str, float],
    ) -> None:
        self.job, self.candidate, self.model, self.ops, self.thresholds = job, candidate, model, list(ops), thresholds
        feeds = job.held_out[:RANK_IMAGES]
        self.batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        self.images = len(feeds)
        self.blocks: list[list[QuantizableOp]] = []
        self.errors: list[BlockError] = []
        self.runner: Optional[SensitivityRunner] = None
        self.measured: dict[str, OpSensitivity] = {}
        self.gone: set[str] = set()

    def foremost(self, count: int) -> list[str]:
        """Return the ``count`` ops that cost most and are still in INT8, fewer if there are no more."""
        if not self.errors:
            self._measure_blocks()
        while True:
            found = [op.name for op in ranked(self.measured.values()) if op.name not in self.gone]
            if len(found) >= count or not self.blocks:
                return found[:count]
            self._measure(self.blocks.pop(0))

    def remove(self, names: Sequence[str]) -> None:
        """Leave ops out from now on: they are float."""
        self.gone.update(names)

    def detection_change(self, name: str) -> float:
        """Return how far the detections move when an op is quantized alone."""
        return self.measured[name].detection_change

    def close(self) -> None:
        """Free the model; it is loaded again when more ops are to be measured."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None

    def _opened(self) -> SensitivityRunner:
        if self.runner is None:
            self.runner = SensitivityRunner(
                Task.of(self.model, self.ops, self.thresholds, [self.batch], self.job.device)
            )
        return self.runner

    def _measure_blocks(self) -> None:
        """Put blocks into the order of their errors; neighbours in the graph are a block."""
        size = max(math.isqrt(len(self.ops)), 1)
        blocks = [self.ops[start : start + size] for start in range(0, len(self.ops), size)]
        with all_cores():
            self.errors = self._opened().block_errors(blocks, self.job.progress)
        order = sorted(range(len(blocks)), key=lambda index: -self.errors[index].error)
        self.blocks = [blocks[index] for index in order]

    def _measure(self, block: Sequence[QuantizableOp]) -> None:
        with all_cores():
            found = self._opened().measure_ops(block, self.job.progress)
        self.measured.update({op.name: op for op in found})
        self.job.analysis = {
            "of": self.candidate.name,
            "sensitivity": {"images": self.images},
            "ops": [dataclasses.asdict(op) for op in self.measured.values()],
            "ranking": [op.name for op in ranked(self.measured.values())],
            "groups": _group_shares(self.errors),
            "attentions": [],
        }


def _group_shares(errors: Sequence[BlockError]) -> list[dict[str, Any]]:
    """Return ``name``, ``ops`` (how many) and ``share`` of the blocks' errors, a block being of its first op's
    group.
    """
    total = sum(block.error for block in errors)
    shares: dict[str, dict[str, Any]] = {}
    for block in errors:
        entry = shares.setdefault(block.group, {"name": block.group, "ops": 0, "share": 0.0})
        entry["ops"] += block.ops
        entry["share"] += block.error / total if total else 0.0
    return list(shares.values())
