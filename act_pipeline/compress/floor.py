"""The floor of accuracy: ops go back to float, the one that costs most first, until an INT8 model is within ``max_drop``.

Which op costs most is measured and not guessed: each op is quantized alone on a few training images, and the error of the
outputs ranks them (`analysis.sensitivity`); before every step, the foremost are released one by one from the model as it
then is, and the one whose release mends most goes back. NNCF's ``quantize_with_accuracy_control`` walks the same way, with the
metric instead of the detections and without measuring anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.executors import measure_sensitivity
from act_pipeline.analysis.matching import agreement_of
from act_pipeline.analysis.sensitivity import OpSensitivity, Task, attention_shares, group_shares, ranked
from act_pipeline.analysis.simulate import Simulation
from act_pipeline.compress.inventory import inventory_of
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.compress.mixed import dequantized, dequantized_ops, give_back, read_thresholds
from act_pipeline.compress.ptq import held_out_feeds

RANK_IMAGES = 4
# Ops of the ranking that are looked at again before a step.
_SHORTLIST = 12
# So many steps of one op; then each step is twice the one before.
_SINGLE_STEPS = 4


class Error:
    """How far a model's detections are from the float model's, for any set of ops in INT8."""

    def __init__(
        self,
        simulation: Simulation,
        feeds: Sequence[Mapping[str, np.ndarray]],
        weight_only: Collection[str] = (),
        progress: bool = False,
    ) -> None:
        self._simulation = simulation
        self._feeds = list(feeds)
        self._weight_only = weight_only
        self._progress = progress

    def of_each(self, choices: Sequence[Collection[str]], what: str = "sensitivity") -> list[float]:
        """Return, for each set of ops in INT8, the change of the detections: 0 for none, 1 where nothing agrees."""
        from tqdm import tqdm

        agreement, objects = np.zeros(len(choices)), np.zeros(len(choices))
        count = len(choices) * len(self._feeds)
        with tqdm(total=count, desc=what, unit="run", disable=not self._progress, leave=False) as bar:
            for feed in self._feeds:
                exact = self._simulation.hold(feed)
                for index, quantized in enumerate(choices):
                    outputs = self._simulation.run(feed, quantized, self._weight_only)
                    agreed, counted = agreement_of(exact, outputs)
                    agreement[index] += agreed
                    objects[index] += counted
                    bar.update()
        return (np.where(objects > 0, 1 - agreement / np.maximum(objects, 1), 0.0)).tolist()


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
        self.feeds = held_out_feeds(job.config, job.reader, self.model, RANK_IMAGES)
        self.given: list[dict[str, Any]] = []
        self.alone: dict[str, float] = {}
        self.best = candidate

    def run(self, limit: Optional[int]) -> Candidate:
        selection = self.candidate.selection
        sensitivities = self._sensitivities()
        self.alone = {op.name: op.detection_change for op in sensitivities}
        waiting = [op.name for op in ranked(sensitivities)]
        # A model of which every op is float is no INT8 model.
        left = min(len(waiting) - 1, len(waiting) if limit is None else limit)
        ops = [op for op in self.ops if op.name not in selection.kept]
        with contextlib.closing(Simulation(self.model, ops, self.job.device)) as simulation:
            simulation.set_thresholds(self.thresholds)
            error = Error(simulation, self.feeds, selection.weight_only, self.job.progress)
            step, size = 0, 1
            while len(self.given) < left:
                size = min(size, left - len(self.given))
                chosen = _next(error, waiting, size)
                made = self._without(chosen)
                if self.job.meets(made):
                    return self._fewest(chosen, made)
                self.given = made.record["given_back"]
                waiting = [name for name in waiting if name not in chosen]
                step += 1
                size = 1 if step < _SINGLE_STEPS else size * 2
        return self.best

    def _sensitivities(self) -> list[OpSensitivity]:
        """Return what each op costs alone; what was measured of this candidate before is taken again."""
        job, candidate = self.job, self.candidate
        if candidate.name not in job.sensitivities:
            int8 = set(candidate.selection.int8)
            ops = [op for op in self.ops if op.name in int8]
            batch = {name: np.concatenate([feed[name] for feed in self.feeds]) for name in self.feeds[0]}
            task = Task.of(self.model, ops, self.thresholds, [batch], job.device)
            job.sensitivities[candidate.name] = measure_sensitivity(task, progress=job.progress)
        found = job.sensitivities[candidate.name]
        job.analysis = {
            "of": candidate.name,
            "sensitivity": {"images": len(self.feeds)},
            "ops": [dataclasses.asdict(op) for op in found],
            "ranking": [op.name for op in ranked(found)],
            "groups": group_shares(found),
            "attentions": attention_shares(found),
        }
        return found

    def _without(self, chosen: Sequence[str]) -> Candidate:
        """Return the candidate with ``chosen`` in float beside what has been given back, evaluated and noted."""
        job, candidate = self.job, self.candidate
        names = [*(entry["output"] for entry in self.given), *chosen]
        selection = candidate.selection.give_back(names, f"given back for max_drop {job.max_drop}")
        model = give_back(candidate.model, names, job.folder("mixed"), candidate.source)
        inventory = inventory_of(model, job.config.op_types, job.config.op_section, selection)
        made = Candidate(
            f"{candidate.name}, {len(names)} float", "mixed", model, candidate.source, selection, inventory,
            dict(candidate.record), {"give_back": time.perf_counter() - self.clock},
            note=f"{len(names)} ops given back to float",
        )
        job.add(made)
        self.clock = time.perf_counter()
        added = [
            {**entry, "sensitivity": self.alone[entry["output"]], "map_after": made.map}
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


def _next(error: Error, waiting: Sequence[str], size: int) -> list[str]:
    """Return the ops whose release from what is still in INT8 leaves the least error."""
    shortlist = list(waiting[: max(_SHORTLIST, size)])
    if len(shortlist) == size:
        return shortlist
    released = error.of_each([[other for other in waiting if other != name] for name in shortlist], "release")
    return [shortlist[index] for index in np.argsort(released, kind="stable")[:size]]
