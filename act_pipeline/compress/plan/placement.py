"""Placement of Q/DQ by measurement: which ops of an INT8 model a runtime computes sooner in float.

Latencies are compared as the ratio within a round, in which every model runs once. A change counts if the median of
the ratios is at least :data:`LEAST_GAIN` and three quarters of the rounds agree on its sign.

1. Every group of ops is reverted to float alone.
2. Groups that gain are reverted together, the one that gains most first, as long as each gains in addition.
3. Groups that gain something, but too little alone, are tried all together.
4. The result is measured again, against all ops in INT8 and against the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

LEAST_GAIN = 0.02
# Labels of the two models of a measurement that asks whether more groups gain in addition.
BEFORE, AFTER = "before", "after"
# A model of a measurement: the names of the ops reverted to float, or the precision of the float model.
Variant = Union[frozenset[str], str]
# Label -> model, to label -> seconds of each round.
Measure = Callable[[Mapping[str, Variant]], Mapping[str, Sequence[float]]]
INT8, MIXED, FLOAT = "int8", "mixed", "float"
# Models that are loaded at the same time, the one that they are compared with included.
_AT_ONCE = 6
# A group that gains less, which may be noise, is not tried with others.
_SMALL_GAIN = 0.005
_NO_OP: frozenset[str] = frozenset()


@dataclass(frozen=True)
class OpGroup:
    """Ops whose precision is decided together.

    Attributes:
        name: for users, such as ``backbone, 3x3 convolutions, 40x40``.
        ops: their names.
    """

    name: str
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Gain:
    """How many times as fast one model is as another: the median over the rounds, less 1.

    Attributes:
        median: of the ratios of all rounds, less 1.
        low: the lower quartile, less 1.
    """

    median: float
    low: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Gain:
        """Return the gain of ``after`` over ``before``, both seconds of the same rounds."""
        ratios = np.asarray(before) / np.asarray(after)
        return cls(float(np.median(ratios)) - 1, float(np.percentile(ratios, 25)) - 1)

    @property
    def counts(self) -> bool:
        return self.median >= LEAST_GAIN and self.low > 0


@dataclass(frozen=True)
class Placement:
    """A decision.

    Attributes:
        verdict: ``int8``: INT8 everywhere; ``mixed``: some groups in float; ``float``: the float model is as fast, and
            INT8 only makes the file smaller.
        reverted: the groups to compute in float.
        gains: name of a group -> how much faster the model is with this group alone in float.
        latency_ms: medians of the last measurement: ``all`` (ops in INT8), ``placed``, and the float model by
            precision.
        int8_gain: gain of the placed model over the fastest float model.
        float_precision: precision of the fastest float model.
    """

    verdict: str
    reverted: tuple[OpGroup, ...]
    gains: Mapping[str, float]
    latency_ms: Mapping[str, float]
    int8_gain: float
    float_precision: str

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops to compute in float."""
        return tuple(op for group in self.reverted for op in group.ops)

    def without_reverts(self) -> Placement:
        """Return the decision where the model with reverted ops cannot be taken; its gain is that of the medians."""
        latency_ms = {**self.latency_ms, "placed": self.latency_ms["all"]}
        gain = latency_ms[self.float_precision] / latency_ms["all"] - 1
        verdict = INT8 if gain >= LEAST_GAIN else FLOAT
        return Placement(verdict, (), self.gains, latency_ms, round(gain, 4), self.float_precision)


def place(groups: Sequence[OpGroup], measure: Measure, floats: Collection[str] = ("fp32",)) -> Placement:
    """Decide which groups compute in float.

    Args:
        groups: the ops that are in INT8; each op is in one group.
        measure: returns the seconds of models in interleaved rounds.
        floats: precisions of the float model to compare with.
    """
    gains = _single_gains(groups, measure)
    order = sorted(groups, key=lambda group: -gains[group.name].median)
    reverted: list[OpGroup] = []
    for group in (group for group in order if gains[group.name].counts):
        if not reverted or _gains_in_addition(reverted, [group], measure):
            reverted.append(group)
    small = [group for group in order if gains[group.name].median >= _SMALL_GAIN and not gains[group.name].counts]
    if small and len(reverted) + len(small) < len(groups) and _gains_in_addition(reverted, small, measure):
        reverted += small
    return _verified(reverted, {name: round(gain.median, 4) for name, gain in gains.items()}, measure, floats)


def _single_gains(groups: Sequence[OpGroup], measure: Measure) -> dict[str, Gain]:
    found = {}
    for start in range(0, len(groups), _AT_ONCE - 1):
        some = groups[start : start + _AT_ONCE - 1]
        times = measure({"all": _NO_OP, **{group.name: frozenset(group.ops) for group in some}})
        found.update({group.name: Gain.of(times["all"], times[group.name]) for group in some})
    return found


def _gains_in_addition(reverted: Sequence[OpGroup], more: Sequence[OpGroup], measure: Measure) -> bool:
    now = _ops(reverted)
    times = measure({BEFORE: now, AFTER: now | _ops(more)})
    return Gain.of(times[BEFORE], times[AFTER]).counts


def _verified(
    reverted: Sequence[OpGroup], gains: Mapping[str, float], measure: Measure, floats: Collection[str]
) -> Placement:
    models: dict[str, Variant] = {"all": _NO_OP, **({"placed": _ops(reverted)} if reverted else {})}
    times = measure({**models, **{precision: precision for precision in floats}})
    if reverted and not Gain.of(times["all"], times["placed"]).counts:
        reverted = ()
    placed = times["placed" if reverted else "all"]
    medians = {label: round(float(np.median(taken)) * 1000, 3) for label, taken in times.items()}
    medians["placed"] = round(float(np.median(placed)) * 1000, 3)
    fastest = min(floats, key=lambda precision: medians[precision])
    gain = Gain.of(times[fastest], placed)
    verdict = FLOAT if not gain.counts else MIXED if reverted else INT8
    return Placement(verdict, tuple(reverted), gains, medians, round(gain.median, 4), fastest)


def _ops(groups: Sequence[OpGroup]) -> frozenset[str]:
    return frozenset(op for group in groups for op in group.ops)


def verdict_line(
    verdict: Optional[str], reverted: int, ops: int, engine: str, float_precision: str, where: str = "here"
) -> str:
    """Return the verdict for users, in one line.

    Args:
        verdict: of a :class:`Placement`.
        reverted: number of ops in float by measurement.
        ops: number of ops that were in INT8 before.
        engine: the runtime.
        float_precision: of the fastest float model, such as ``fp32``.
        where: the machine that was measured.
    """
    if verdict == FLOAT:
        return f"ship {float_precision.upper()}: INT8 is not faster in {engine} {where}"
    if verdict == MIXED:
        return f"mixed: {reverted} of {ops} ops in float, since {engine} computes them sooner so {where}"
    return f"INT8 everywhere: no op is worth reverting in {engine} {where}"
