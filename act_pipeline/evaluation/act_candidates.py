"""The models in ``act.json``: size and scores, the candidates that were tried, and the ops that are not INT8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_pipeline.evaluation.comparison import ComparisonFigures
from act_pipeline.evaluation.result import Evaluation


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
