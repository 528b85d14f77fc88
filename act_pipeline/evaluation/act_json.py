"""The content of ``act.json``: a compression's models, the candidates that it tried, and how they were evaluated.

Written by `act_pipeline.compress`, read by the report and by the table of the command line. Records of earlier versions
lack some keys; reading gives None or an empty value for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from act_pipeline.evaluation.act_candidates import FloatOp, ModelFigures, Step
from act_pipeline.evaluation.act_measurements import EvaluatedIn, LatencyPair, PlacementRecord, ReferenceCheck
from act_pipeline.evaluation.comparison import ComparisonFigures

_DETAILS = ("calibration", "equalization", "residuals", "taken_back", "smooth_quant", "training")


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
        details: ``calibration``, ``equalization``, ``residuals``, ``taken_back``, ``smooth_quant`` and ``training`` of
            the saved candidate, as in the file.
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
