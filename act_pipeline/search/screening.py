"""The first look at variants in float: latency beside the full model, and mAP on the first images.

Variants are looked at from the largest to the smallest. One that is surely beyond a limit is not made smaller: with
fewer decoder layers or queries at the same input size it would be worse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.compress.judging.judge import Judge
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.engines.interface import Engine
from act_pipeline.evaluation.batches import Latencies, measure_in_turns
from act_pipeline.evaluation.runner import evaluate_in_parallel
from act_pipeline.families.interface import PROMPTS
from act_pipeline.search.halving import Entry, Limits, steps
from act_pipeline.search.variants import Variant

# Models in memory at a time, besides the full one.
_TOGETHER = 4
# Images of each input size that are timed, in turns.
_TIMED_IMAGES = 4


@dataclass(frozen=True)
class Skipped:
    """A variant that was not tried.

    Attributes:
        variant: the variant.
        larger: a larger one, which is surely beyond a limit.
    """

    variant: Variant
    larger: Variant


def screen(
    variants: Sequence[Variant], make: Callable[[Variant], Entry], look: Callable[[Sequence[Entry]], None]
) -> tuple[list[Entry], list[Skipped]]:
    """Look at variants, the larger ones first.

    Args:
        variants: the variants without the full model.
        make: exports one.
        look: times some of them and evaluates them on the first images; it drops those that are surely beyond a limit.

    Returns:
        Those that were looked at, and the others.
    """
    remaining = list(variants)
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    while remaining:
        wave = [one for one in remaining if not any(one.is_cut_of(other) for other in remaining)]
        remaining = [one for one in remaining if one not in wave]
        made = []
        for variant in wave:
            larger = [entry.variant for entry in entries if entry.dropped and variant.is_cut_of(entry.variant)]
            if larger:
                skipped.append(Skipped(variant, larger[0]))
            else:
                made.append(make(variant))
        for start in range(0, len(made), _TOGETHER):
            look(made[start : start + _TOGETHER])
        entries += made
    return entries, skipped


Loaded = Mapping[str, tuple[Engine, Sequence[Mapping[str, np.ndarray]]]]


def first_look(
    judge: Judge,
    full: Entry,
    reference: Loaded,
    entries: Sequence[Entry],
    limits: Limits,
    rounds: int,
    progress: bool = False,
) -> None:
    """Evaluate variants on the images of the first step, and time them in turns with the full model.

    Args:
        judge: runs them.
        full: the full model; its latencies are set.
        reference: the full model, see :func:`loaded`.
        entries: the variants; their latencies and evaluations are set, and those beyond the limits dropped.
        limits: what they are held to.
        rounds: rounds of the timing.
        progress: show a progress bar for each evaluation on stderr.
    """
    count = steps(limits.reference.images)[0]
    limit = None if count == limits.reference.images else count
    with loaded(judge, {entry.variant.name: (entry.model, entry.reader) for entry in entries}, "fp32") as found:
        for entry in entries:
            engine, _ = found[entry.variant.name]
            limits.judge(entry, evaluate_in_parallel([engine], entry.reader, progress=progress, limit=limit))
        measured = timed_in_turns({**reference, **found}, rounds, warmup=1)
    full.latencies = full.latencies or measured[full.variant.name]
    for entry in entries:
        entry.latencies = measured[entry.variant.name]


@contextlib.contextmanager
def loaded(judge: Judge, models: Mapping[str, tuple[InferenceModel, Reader]], precision: str) -> Iterator[Loaded]:
    """Load models, each with the first images in its own input size; yield name -> engine and batches."""
    with contextlib.ExitStack() as stack:
        engines: dict[str, tuple[Engine, list[dict[str, Any]]]] = {}
        for name, (model, reader) in models.items():
            engine = stack.enter_context(contextlib.closing(judge.load(model, precision, reader)))
            found = zip(range(_TIMED_IMAGES), reader.loader("eval", batch_size=1, shuffle=False, drop_last=False))
            batches = [{key: array for key, array in batch.items() if key != PROMPTS} for _, batch in found]
            engines[name] = engine, batches
        yield engines


def timed_in_turns(found: Loaded, rounds: int, warmup: int = 2) -> dict[str, Latencies]:
    """Measure latencies in turns, each model on the first images in its own input size; ratios are to the first one.

    Args:
        found: the models.
        rounds: number of timed rounds.
        warmup: number of untimed rounds before them.
    """
    count = min(len(batches) for _, batches in found.values())
    engines: dict[str, Any] = {name: _OnOwnImages(engine, batches) for name, (engine, batches) in found.items()}
    return measure_in_turns(engines, [{"place": np.array(place)} for place in range(count)], rounds, warmup)


class _OnOwnImages:
    """An engine that runs images of its own input size, chosen by their position."""

    def __init__(self, engine: Engine, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._engine, self._batches = engine, batches

    def run(self, place: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._engine.run(self._batches[int(place["place"])])
