"""What ``act.json`` says of how models were measured: engine, latencies, the reference engine, the placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvaluatedIn:
    """How the models were evaluated.

    Attributes:
        engine, fp32_engine: engine of the INT8 models, and of the float model.
        why: why this engine was chosen.
        fp32_cached: whether the float model's evaluation is from an earlier run.
        device: ``CPU`` or ``GPU``.
        engines: number of engines that ran in parallel.
        threads: CPU threads of all of them.
        images: number of evaluated images; 0: nothing was evaluated.
    """

    engine: str | None = None
    fp32_engine: str | None = None
    why: str | None = None
    fp32_cached: bool | None = None
    device: str | None = None
    engines: int | None = None
    threads: int | None = None
    images: int | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> EvaluatedIn:
        return cls(**{name: found.get(name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class ImageLatency:
    """Latency of one image in ms: the median and the 90th percentile."""

    p50_ms: float
    p90_ms: float


@dataclass(frozen=True)
class LatencyPair:
    """Latencies of the float and the saved INT8 model, measured in turns.

    Attributes:
        rounds: number of rounds.
        fp32, int8: latencies.
        ratio: how many times as fast INT8 is, the median over the rounds.
    """

    rounds: int | None
    fp32: ImageLatency
    int8: ImageLatency
    ratio: float

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> LatencyPair | None:
        if not found:
            return None
        fp32, int8 = (ImageLatency(found[side]["p50_ms"], found[side]["p90_ms"]) for side in ("fp32", "int8"))
        return cls(found.get("rounds"), fp32, int8, found["ratio"])


@dataclass(frozen=True)
class ReferenceCheck:
    """Evaluation of the saved INT8 model in the reference engine.

    Attributes:
        engine: the reference engine.
        images: number of images.
        map: mAP in the reference engine.
        judged_map: mAP in the evaluation engine on the same images; None if they have no ground truth.
        low, high: 95% interval of ``judged_map`` - ``map``; None with ``judged_map``.
    """

    engine: str
    images: int
    map: float
    judged_map: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> ReferenceCheck | None:
        if not found:
            return None
        bounds = found.get("difference") or {}
        judged = found.get("judged_map")
        return cls(found["engine"], found["images"], found["map"], judged, bounds.get("low"), bounds.get("high"))

    def as_json(self) -> dict[str, Any]:
        record = {"engine": self.engine, "images": self.images, "map": self.map}
        if self.judged_map is None:
            return record
        return {**record, "judged_map": self.judged_map, "difference": {"low": self.low, "high": self.high}}


@dataclass(frozen=True)
class PlacementRecord:
    """Which ops compute in float because the runtime computes them sooner so, see `compress.plan.placement`.

    Attributes:
        verdict: ``int8`` (no op), ``mixed`` (some), ``float``: INT8 is not faster than the float model.
        line: the verdict in one line.
        engine: the runtime.
        ops: number of ops that were in INT8 before.
        reverted: names of the ops that are in float now.
        groups: name of a group that was reverted -> number of its ops.
        gains: name of every group -> how much faster the model is with this group alone in float, as a share.
        latency_ms: medians: ``all`` (ops in INT8), ``placed``, and the float model by precision.
        int8_gain: how much faster the saved model is than the fastest float model, as a share.
        float_precision: precision of the fastest float model.
        measured, from_cache: number of measurements that were made, and that an earlier run had made.
        device: the machine that was measured; None: the one that compressed.
        batch: number of images that were timed at once.
    """

    verdict: str
    line: str
    engine: str
    ops: int
    reverted: Sequence[str] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    int8_gain: float | None = None
    float_precision: str = "fp32"
    measured: int | None = None
    from_cache: int | None = None
    device: str | None = None
    batch: int = 1

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> PlacementRecord | None:
        if not found:
            return None
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})
