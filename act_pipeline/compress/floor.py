"""The floor of accuracy: ops go back to float, the one that costs most first, until an INT8 model is within ``max_drop``.

Which op costs most is measured and not guessed: each op is quantized alone, and the change in the detections on a few
training images ranks them; before every step, the foremost are released one by one from the model as it then is, and
the one whose release mends most goes back. NNCF's ``quantize_with_accuracy_control`` walks the same way, with the
metric instead of the detections and without measuring anew.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.matching import agreement_of
from act_pipeline.analysis.simulate import Simulation
from act_pipeline.compress.inventory import inventory_of
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.compress.mixed import dequantized, give_back, read_thresholds
from act_pipeline.compress.ptq import held_out_feeds

_logger = logging.getLogger(__name__)
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
    start = time.perf_counter()
    candidates = list(candidate.selection.int8)
    given: list[dict[str, Any]] = []
    # A model of which every op is float is no INT8 model.
    left = min(len(candidates) - 1, len(candidates) if limit is None else limit)
    best = candidate
    with _measuring(job, candidate) as error:
        alone = dict(zip(candidates, error.of_each([[name] for name in candidates])))
        waiting = sorted(candidates, key=lambda name: -alone[name])
        size, singles = 1, 0
        while waiting and len(given) < left:
            size = min(size, left - len(given))
            chosen = _next(error, waiting, size)
            made = _without(job, candidate, given, [(name, alone[name]) for name in chosen], start)
            best = max(best, made, key=lambda found: found.map)
            if job.meets(made):
                return _fewest(job, candidate, given, [(name, alone[name]) for name in chosen], made, start)
            given = made.record["given_back"]
            waiting = [name for name in waiting if name not in chosen]
            singles += 1
            size = size if singles < _SINGLE_STEPS else size * 2
    return best


@contextlib.contextmanager
def _measuring(job: Job, candidate: Candidate) -> Iterator[Error]:
    selection = candidate.selection
    model = candidate.source or dequantized(candidate.model, job.folder("dequantized") / "float")
    feeds = held_out_feeds(job.config, job.reader, model, RANK_IMAGES)
    ops = [op for op in selection.ops if op.name not in selection.kept]
    with contextlib.closing(Simulation(model, ops, job.device)) as simulation:
        simulation.set_thresholds(read_thresholds(candidate.model))
        yield Error(simulation, feeds, selection.weight_only, job.progress)


def _next(error: Error, waiting: Sequence[str], size: int) -> list[str]:
    """Return the ops whose release from what is still in INT8 leaves the least error."""
    shortlist = list(waiting[: max(_SHORTLIST, size)])
    if len(shortlist) == size:
        return shortlist
    released = error.of_each([[other for other in waiting if other != name] for name in shortlist], "release")
    return [shortlist[index] for index in np.argsort(released, kind="stable")[:size]]


def _without(
    job: Job,
    candidate: Candidate,
    given: Sequence[Mapping[str, Any]],
    more: Sequence[tuple[str, float]],
    start: float,
) -> Candidate:
    """Return the candidate with the ops ``given`` and ``more`` in float, evaluated and noted."""
    names = [*(entry["output"] for entry in given), *(name for name, _ in more)]
    selection = candidate.selection.give_back(names, f"given back for max_drop {job.max_drop}")
    model = give_back(candidate.model, names, job.folder("mixed"), candidate.source)
    inventory = inventory_of(model, job.config.op_types, "QuantPost", selection)
    made = Candidate(
        f"{candidate.name} - {len(names)}", "mixed", model, candidate.source, selection, inventory,
        {**candidate.record}, {"give_back": time.perf_counter() - start},
        note=f"{len(names)} ops given back to float",
    )
    job.add(made)
    sensitivities = dict(more)
    added = [
        {**entry, "sensitivity": sensitivities[entry["output"]], "map_after": made.map}
        for entry in selection.describe(list(sensitivities))
    ]
    made.record["given_back"] = [*given, *added]
    _logger.info("%d ops given back: mAP %.4f, drop %.4f", len(names), made.map, job.drop(made))
    return made


def _fewest(
    job: Job,
    candidate: Candidate,
    given: Sequence[Mapping[str, Any]],
    last: Sequence[tuple[str, float]],
    made: Candidate,
    start: float,
) -> Candidate:
    """Return the least part of the last step that is enough, by bisection; ``made`` has all of it."""
    enough, too_few = len(last), 0
    while enough - too_few > 1:
        count = (enough + too_few) // 2
        fewer = _without(job, candidate, given, last[:count], start)
        if job.meets(fewer):
            enough, made = count, fewer
        else:
            too_few = count
    return made
