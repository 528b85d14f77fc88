"""The content of ``act.json``: a compression's models, the candidates that it tried, and how they were evaluated.

Written by `act_pipeline.compress`, read by the report and by the table of the command line. Records of earlier versions
lack some keys; reading gives None or an empty value for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from act_pipeline.evaluation.comparison import ComparisonFigures
from act_pipeline.evaluation.result import Evaluation

_DETAILS = ("calibration", "equalization", "taken_back", "smooth_quant", "training")


@dataclass(frozen=True)
class ModelFigures:
    """Size and scores of one model; the scores are None if it was not evaluated, or on images without labels.

    Attributes:
        bytes: size of the model.
        map, map50, stats, per_class, latency_ms, images_per_second, miou: see
            :class:`act_pipeline.evaluation.result.Evaluation`.
    """

    bytes: int | None = None
    map: float | None = None
    map50: float | None = None
    stats: Mapping[str, float | None] | None = None
    per_class: Mapping[str, float | None] | None = None
    latency_ms: Mapping[str, float] | None = None
    images_per_second: float | None = None
    miou: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation | None, size: int, per_class: bool = True) -> ModelFigures:
        """Return the figures of an evaluated model.

        Args:
            evaluation: the evaluation; None: the model was not evaluated.
            size: size of the model in bytes.
            per_class: whether to include the AP of each class.
        """
        if evaluation is None:
            return cls(size)
        speed: dict[str, Any] = {"latency_ms": evaluation.latency_ms, "images_per_second": evaluation.images_per_second}
        if not evaluation.has_map:
            return cls(size, **speed)
        classes = evaluation.per_class if per_class else None
        return cls(size, evaluation.map, evaluation.map50, evaluation.stats, classes, **speed, miou=evaluation.miou)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ModelFigures:
        """Read the figures; further keys are ignored."""
        return cls(**{name: found.get(name) for name in cls.__dataclass_fields__})

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object; the entries of an evaluation are missing if there was none."""
        figures: dict[str, Any] = {"map": self.map, "map50": self.map50, "bytes": self.bytes}
        if self.stats is None and self.images_per_second is None:
            return figures
        figures["stats"] = self.stats
        if self.miou is not None:
            figures["miou"] = self.miou
        if self.per_class is not None:
            figures["per_class"] = self.per_class
        return {**figures, "latency_ms": self.latency_ms, "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Step:
    """A candidate that was tried.

    Attributes:
        name: such as ``ptq:mse``.
        strategy: ``ptq``, ``smooth_quant``, ``mixed`` or ``qat_dis``.
        note: how the model differs from the strategy's usual output; may be empty.
        figures: its size and scores, without AP by class.
        map_drop: the float model's mAP minus its mAP; None: not evaluated.
        comparison: its comparison with the float model.
        quantized, kept, weight_only: number of ops in INT8, in float, and with INT8 weights only.
        seconds: duration of making and evaluating it.
        meets_max_drop: whether it is within ``max_drop`` and has ``min_agreement``.
        chosen: whether it is the saved model.
        settings: settings in records of earlier versions.
    """

    name: str
    strategy: str | None
    note: str
    figures: ModelFigures
    map_drop: float | None
    comparison: ComparisonFigures
    quantized: int | None
    kept: int | None
    weight_only: int | None
    seconds: float | None
    meets_max_drop: bool | None
    chosen: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Step:
        """Read an entry of ``steps``."""
        same = ("strategy", "map_drop", "quantized", "kept", "weight_only", "seconds", "meets_max_drop")
        return cls(
            name=str(found.get("name")),
            note=found.get("note") or "",
            figures=ModelFigures.from_json(found),
            comparison=ComparisonFigures.from_json(found),
            chosen=bool(found.get("chosen")),
            settings=found.get("settings") or {},
            **{name: found.get(name) for name in same},
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``steps``."""
        return {
            "name": self.name,
            "strategy": self.strategy,
            "note": self.note,
            **self.figures.as_json(),
            "map_drop": self.map_drop,
            **self.comparison.as_json(),
            "quantized": self.quantized,
            "kept": self.kept,
            "weight_only": self.weight_only,
            "seconds": self.seconds,
            "meets_max_drop": self.meets_max_drop,
            "chosen": self.chosen,
        }


@dataclass(frozen=True)
class FloatOp:
    """An op that does not compute entirely in INT8; entries that were not recorded are None.

    Attributes:
        output: name of its first output, which names the op.
        type, module, group: type of the op, module of the network, and part of the detector.
        reason: why it is in float.
        sensitivity: change of the detections when it alone is quantized, in [0, 1]; of ops reverted to float.
        map_after: mAP of the candidate in which it was reverted to float.
    """

    output: str
    type: str | None = None
    module: str | None = None
    group: str | None = None
    reason: str | None = None
    sensitivity: float | None = None
    map_after: float | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> FloatOp:
        """Read an entry of ``kept_ops``, ``weight_only_ops`` or ``given_back``."""
        more = {name: found.get(name) for name in cls.__dataclass_fields__ if name != "output"}
        return cls(found.get("output") or found.get("name") or "", **more)

    def as_json(self) -> dict[str, Any]:
        """Return the entry, without what is None."""
        names = ("type", "output", "module", "group", "reason", "sensitivity", "map_after")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


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


@dataclass(frozen=True)
class ActRecord:
    """The content of ``act.json``.

    Attributes:
        strategy: ``Strategy.name``.
        chosen: name of the saved candidate.
        max_drop: allowed mAP drop; None: no limit, or no labels.
        fp32, int8: the float model and the saved INT8 model.
        confidence: ``Strategy.confidence``; None without limits.
        min_agreement: the least agreement with the float model; None: no limit.
        map_drop: mAP drop of the saved model; None: not evaluated, or no labels.
        comparison: comparison of the saved model with the float model.
        bytes_ratio: size of the INT8 model / size of the float model.
        seconds: stage -> seconds.
        quantizable_ops: number of ops that could be quantized.
        quantized_ops: op type -> number of ops in INT8.
        kept_ops, weight_only_ops: ops in float, and ops with INT8 weights whose activations have no fixed scale (float,
            or rounded at run time where the reason is ``quantize.dynamic``).
        given_back: ops that accuracy control reverted to float.
        details: ``calibration``, ``equalization``, ``taken_back``, ``smooth_quant`` and ``training`` of the saved
            candidate, as in the file.
        steps: the candidates, in the order in which they were tried.
        evaluation: how the models were evaluated.
        latency: latencies of both models; None: not measured.
        reference: evaluation in the reference engine; None: there was none.
        placement: the placement by measurement; None: ``Strategy.placement`` is ``all``.
        model_hash: hash of the INT8 model.
        overrides: ``Section.key=value`` that were set over the config; None in records of earlier versions.
        source_hash, data_hash, config, versions: what the model was made from, read from the file only.
    """

    strategy: str | None = None
    chosen: str | None = None
    max_drop: float | None = None
    fp32: ModelFigures = ModelFigures()
    int8: ModelFigures = ModelFigures()
    confidence: float | None = None
    min_agreement: float | None = None
    map_drop: float | None = None
    comparison: ComparisonFigures = ComparisonFigures()
    bytes_ratio: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    quantizable_ops: int | None = None
    quantized_ops: Mapping[str, int] = field(default_factory=dict)
    kept_ops: Sequence[FloatOp] = ()
    weight_only_ops: Sequence[FloatOp] = ()
    given_back: Sequence[FloatOp] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    evaluation: EvaluatedIn = EvaluatedIn()
    latency: LatencyPair | None = None
    reference: ReferenceCheck | None = None
    placement: PlacementRecord | None = None
    model_hash: str | None = None
    overrides: Sequence[str] | None = None
    source_hash: str | None = None
    data_hash: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ActRecord:
        """Read the content of an ``act.json``."""

        def ops(name: str) -> tuple[FloatOp, ...]:
            return tuple(FloatOp.from_json(op) for op in found.get(name) or ())

        return cls(
            strategy=found.get("strategy"),
            chosen=found.get("chosen"),
            max_drop=found.get("max_drop"),
            fp32=ModelFigures.from_json(found.get("fp32") or {}),
            int8=ModelFigures.from_json(found.get("int8") or {}),
            confidence=found.get("confidence"),
            min_agreement=found.get("min_agreement"),
            map_drop=found.get("map_drop"),
            comparison=ComparisonFigures.from_json(found),
            bytes_ratio=found.get("bytes_ratio"),
            seconds=found.get("seconds") or {},
            quantizable_ops=found.get("quantizable_ops"),
            quantized_ops=found.get("quantized_ops") or {},
            kept_ops=ops("kept_ops"),
            weight_only_ops=ops("weight_only_ops"),
            given_back=ops("given_back"),
            details={name: found[name] for name in _DETAILS if name in found},
            steps=tuple(Step.from_json(step) for step in found.get("steps") or ()),
            evaluation=EvaluatedIn.from_json(found.get("evaluation") or {}),
            latency=LatencyPair.from_json(found.get("latency")),
            reference=ReferenceCheck.from_json(found.get("reference")),
            placement=PlacementRecord.from_json(found.get("placement")),
            model_hash=found.get("model_hash"),
            overrides=found.get("overrides"),
            source_hash=found.get("source_hash"),
            data_hash=found.get("data_hash") or {},
            config=found.get("config") or {},
            versions=found.get("versions") or {},
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``act.json`` that describes the result, in the order of the file."""
        return {
            "strategy": self.strategy,
            "chosen": self.chosen,
            "max_drop": self.max_drop,
            "fp32": self.fp32.as_json(),
            "int8": self.int8.as_json(),
            "confidence": self.confidence,
            "min_agreement": self.min_agreement,
            "map_drop": self.map_drop,
            **self.comparison.as_json(),
            "bytes_ratio": self.bytes_ratio,
            "seconds": dict(self.seconds),
            "quantizable_ops": self.quantizable_ops,
            "quantized_ops": self.quantized_ops,
            "kept_ops": [op.as_json() for op in self.kept_ops],
            "weight_only_ops": [op.as_json() for op in self.weight_only_ops],
            "given_back": [op.as_json() for op in self.given_back],
            **self.details,
            "steps": [step.as_json() for step in self.steps],
            "evaluation": asdict(self.evaluation),
            "latency": None if self.latency is None else asdict(self.latency),
            "reference": None if self.reference is None else self.reference.as_json(),
            "placement": None if self.placement is None else asdict(self.placement),
            "model_hash": self.model_hash,
            "overrides": None if self.overrides is None else list(self.overrides),
        }

    @property
    def training(self) -> Mapping[str, Any] | None:
        """``training`` as in the file: ``loss`` by iteration and ``evaluations``; None: nothing was trained."""
        return self.details.get("training")
