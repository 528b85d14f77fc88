"""Comparison of models: the verdict, and the rows of the report's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from act_pipeline.evaluation.act_candidates import ModelFigures, Step
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.certainty import rounded_up
from act_pipeline.evaluation.comparison import AgreementInterval, Interval
from act_pipeline.evaluation.confidence import TOLERANCE
from act_pipeline.report.curves import Scores
from act_pipeline.report.errors import SIZES
from act_pipeline.report.sources import HALF_PRECISIONS, EnginePair, EngineRow

_SIZE_STATS = tuple(f"ap_{size}" for size in SIZES)


@dataclass(frozen=True)
class ChangeInterval:
    """Confidence interval of the mAP change (INT8 - FP32); see :class:`Interval` for the attributes."""

    low: float
    high: float
    level: float
    resamples: int

    @classmethod
    def of(cls, found: Interval | None) -> ChangeInterval | None:
        """Return the interval of the change for one of the drop."""
        return None if found is None else cls(-found.high, -found.low, found.level, found.resamples)


@dataclass(frozen=True)
class TableRow:
    """A row of the table of models; unknown entries are None.

    Attributes:
        name: name of the row.
        map, map50, ap_small, ap_medium, ap_large: scores in [0, 1].
        map_change: mAP - FP32's mAP.
        interval: confidence interval of the change.
        agreement: agreement with FP32, with its confidence interval.
        bytes: size.
        times_smaller: FP32's size / size.
        latency_ms: median latency in ms.
        times_as_fast: FP32's latency / latency, where both were timed in the same way.
        engine: the engine of the latency.
        quantized, kept: number of ops in INT8 and in float.
        seconds: duration of making the model.
        meets_max_drop: whether it is within the allowed drop.
        chosen: whether it is the saved model.
        failure: why it did not run.
        note: how it differs from the strategy's usual output.
    """

    name: str
    map: float | None = None
    map_change: float | None = None
    interval: ChangeInterval | None = None
    map50: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    bytes: int | None = None
    times_smaller: float | None = None
    latency_ms: float | None = None
    times_as_fast: float | None = None
    engine: str | None = None
    quantized: int | None = None
    kept: int | None = None
    seconds: float | None = None
    meets_max_drop: bool | None = None
    chosen: bool = False
    failure: str | None = None
    note: str | None = None
    agreement: AgreementInterval | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class StrategyRow(TableRow):
    """The row of a candidate, with the strategy that made it and its settings."""

    strategy: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """Speed of the pair of the verdict: see :class:`act_pipeline.report.sources.EngineRow`."""

    engine: str | None
    fp32_engine: str | None
    device: str | None
    fp32_ms: float | None
    int8_ms: float | None
    times_as_fast: float | None
    map: float | None
    in_turns: bool
    batch_size: int | None


@dataclass(frozen=True)
class Verdict:
    """The verdict: whether INT8 is within the allowed drop, and its size and speed; None where not measured.

    Attributes:
        state: ``holds``, ``below``, ``no_limit`` (no allowed drop) or ``not_measured``.
        map_fp32, map_int8, map_change: scores, and their difference.
        max_drop: allowed mAP drop.
        interval: confidence interval of the change.
        probability: share of the resamples within ``max_drop``.
        tells: whether the interval lies on one side of ``max_drop``.
        images_needed: how many images would decide it, rounded up.
        agreement: agreement of the boxes.
        by: the figure that ``state`` is about: ``map`` or ``agreement``.
        min_agreement: the least agreement with FP32.
        agreement_interval: agreement of INT8 with FP32 in one number, with its confidence interval.
        agreement_probability, agreement_tells, agreement_images_needed: as ``probability``, ``tells`` and
            ``images_needed``, for ``min_agreement``.
        lowest_map: the lowest allowed mAP.
        bytes_fp32, bytes_int8, times_smaller: sizes, and their ratio.
        speed: the fastest pair of engines.
        strategy: name of the saved candidate.
        quantized, kept, quantizable: number of ops in INT8, in float, and in all.
    """

    state: str
    map_fp32: float | None
    map_int8: float | None
    map_change: float | None
    max_drop: float | None
    interval: ChangeInterval | None
    probability: float | None
    tells: bool | None
    images_needed: int | None
    agreement: Any
    by: str
    min_agreement: float | None
    agreement_interval: AgreementInterval | None
    agreement_probability: float | None
    agreement_tells: bool | None
    agreement_images_needed: int | None
    lowest_map: float | None
    bytes_fp32: int | None
    bytes_int8: int | None
    times_smaller: float | None
    speed: Speed | None
    strategy: str | None
    quantized: int
    kept: int
    quantizable: int

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def model_figures(part: ModelFigures, scores: Scores | None) -> ModelFigures:
    """Return the figures of one model, those that are not in its record from recomputed scores.

    Args:
        part: ``fp32`` or ``int8`` of ``act.json``.
        scores: scores recomputed from the detections; None if there are none.
    """
    stats = part.stats or (scores.stats if scores else {})
    per_class = part.per_class or (scores.per_class if scores else {})
    return ModelFigures(part.bytes, part.map, part.map50, stats, per_class, part.latency_ms, part.images_per_second)


def verdict_of(act: ActRecord, fp32: ModelFigures, int8: ModelFigures, pair: EnginePair | None) -> Verdict:
    """Return the verdict.

    Args:
        act: ``act.json``.
        fp32, int8: the models' figures.
        pair: the output of :func:`act_pipeline.report.sources.fastest_pair`.
    """
    change, max_drop, found = change_of(fp32.map, int8.map), act.max_drop, act.comparison
    state, by = _state(act, change)
    chosen = next((step.name for step in act.steps if step.chosen), None)
    quantized = sum(act.quantized_ops.values())
    measured = found.map_drop_interval is not None and max_drop is not None
    return Verdict(
        state=state,
        map_fp32=fp32.map,
        map_int8=int8.map,
        map_change=change,
        max_drop=max_drop,
        interval=ChangeInterval.of(found.map_drop_interval),
        probability=found.probability_within_max_drop,
        tells=found.decides(max_drop) if measured else None,
        images_needed=_rounded(found.images_needed),
        agreement=found.agreement,
        by=by,
        min_agreement=act.min_agreement,
        agreement_interval=found.agreement_interval,
        agreement_probability=found.probability_of_min_agreement,
        agreement_tells=(
            None
            if act.min_agreement is None or found.agreement_interval is None
            else found.decides_agreement(act.min_agreement)
        ),
        agreement_images_needed=_rounded(found.agreement_images_needed),
        lowest_map=None if max_drop is None or fp32.map is None else fp32.map - max_drop,
        bytes_fp32=fp32.bytes,
        bytes_int8=int8.bytes,
        times_smaller=_ratio(fp32.bytes, int8.bytes),
        speed=None if pair is None else _speed(*pair),
        strategy=chosen or act.strategy,
        quantized=quantized,
        kept=len(act.kept_ops),
        quantizable=act.quantizable_ops or quantized + len(act.kept_ops),
    )


def _state(act: ActRecord, change: float | None) -> tuple[str, str]:
    """Return ``state`` and ``by`` of the verdict: the limit that does not hold, else the mAP, if it was measured."""
    agreed = act.comparison.agreement_interval
    by_agreement = "no_limit" if agreed is not None else "not_measured"
    if agreed is not None and act.min_agreement is not None:
        by_agreement = "holds" if _agrees(act, agreed.value, act.min_agreement) else "below"
    if change is None:
        return (by_agreement, "agreement") if agreed is not None else ("not_measured", "map")
    by_map = "no_limit"
    if act.max_drop is not None:
        by_map = "holds" if _holds(act, change, act.max_drop) else "below"
    decisive = by_agreement == "below" or (by_agreement == "holds" and by_map == "no_limit")
    return (by_agreement, "agreement") if decisive and by_map != "below" else (by_map, "map")


def _agrees(act: ActRecord, value: float, min_agreement: float) -> bool:
    """Return whether INT8 has ``min_agreement``, as :func:`_holds` for the drop."""
    confidence, probability = act.confidence, act.comparison.probability_of_min_agreement
    if confidence is None or confidence == 0.5 or probability is None:
        return value >= min_agreement - TOLERANCE
    return probability >= confidence


def _rounded(count: int | None) -> int | None:
    return None if count is None else rounded_up(count)


def _speed(fp32: EngineRow, int8: EngineRow) -> Speed:
    return Speed(
        engine=int8.engine,
        fp32_engine=fp32.engine,
        device=int8.device,
        fp32_ms=fp32.p50,
        int8_ms=int8.p50,
        times_as_fast=int8.speed_ratio,
        map=int8.map,
        in_turns=int8.together is not None,
        batch_size=int8.batch_size,
    )


def _holds(act: ActRecord, change: float, max_drop: float) -> bool:
    """Return whether INT8 is within ``max_drop`` at the configured confidence; at 0.5 the measured drop decides."""
    confidence, probability = act.confidence, act.comparison.probability_within_max_drop
    if confidence is None or confidence == 0.5 or probability is None:
        return -change <= max_drop
    return probability >= confidence


def before_and_after(
    act: ActRecord, fp32: ModelFigures, int8: ModelFigures, engines: Sequence[EngineRow], pair: EnginePair | None
) -> list[TableRow]:
    """Return rows for FP32, FP16 (or BF16) if it was measured, and INT8, with latencies in the fastest engine for INT8.

    Without a ``pair`` the latencies are those of the two evaluations; no ratio is computed, since these ran at
    different times.

    Args:
        act: ``act.json``.
        fp32, int8: the models' figures.
        engines: the output of :meth:`act_pipeline.report.sources.Sources.engine_rows`.
        pair: the output of :func:`act_pipeline.report.sources.fastest_pair`.
    """

    def speed(part: ModelFigures, precision: str, timed: EngineRow | None) -> dict[str, Any]:
        if timed is not None:
            return {"latency_ms": timed.p50, "times_as_fast": timed.speed_ratio, "engine": timed.engine}
        return {"latency_ms": _p50(part), "engine": _own_engine(act, precision) if part.latency_ms else None}

    before, after = (None, None) if pair is None else pair
    rows = [TableRow("FP32", **_scores(fp32, fp32), **speed(fp32, "fp32", before))]
    half = _half(engines, pair)
    if half is not None:
        rows.append(TableRow(half.precision.upper(), **_scores(_figures_of(half), fp32), **_timed(half)))
    rows.append(
        TableRow(
            "INT8",
            **_scores(int8, fp32),
            **speed(int8, "int8", after),
            quantized=sum(act.quantized_ops.values()),
            kept=len(act.kept_ops),
            interval=ChangeInterval.of(act.comparison.map_drop_interval),
            agreement=act.comparison.agreement_interval,
        )
    )
    return rows


def strategy_row(step: Step, act: ActRecord, fp32: ModelFigures) -> StrategyRow:
    """Return the row of one candidate; it has no speed ratio, since its latency is from its own evaluation.

    Args:
        step: the candidate.
        act: ``act.json``.
        fp32: the float model's figures.
    """
    return StrategyRow(
        step.name,
        **_scores(step.figures, fp32),
        latency_ms=_p50(step.figures),
        engine=_own_engine(act, "int8") if step.figures.latency_ms else None,
        quantized=step.quantized,
        kept=step.kept,
        seconds=step.seconds,
        meets_max_drop=step.meets_max_drop,
        interval=ChangeInterval.of(step.comparison.map_drop_interval),
        agreement=step.comparison.agreement_interval,
        chosen=step.chosen,
        note=step.note or None,
        strategy=step.strategy,
        settings=step.settings,
    )


def engine_row(row: EngineRow, fp32: ModelFigures) -> TableRow:
    """Return the row of one engine's measurement.

    Args:
        row: an element of :meth:`act_pipeline.report.sources.Sources.engine_rows`.
        fp32: the float model's figures.
    """
    return TableRow(row.label, **_scores(_figures_of(row), fp32), **_timed(row), failure=row.failure)


def _figures_of(row: EngineRow) -> ModelFigures:
    return ModelFigures(row.bytes, row.map, row.map50, row.stats, latency_ms=row.latency_ms)


def _timed(row: EngineRow) -> dict[str, Any]:
    """Return the entries of a table row that describe a measurement's speed."""
    return {"latency_ms": row.p50, "times_as_fast": row.speed_ratio, "engine": row.engine}


def _scores(found: ModelFigures, fp32: ModelFigures) -> dict[str, Any]:
    """Return the entries of a table row that describe a model's scores and size."""
    stats = found.stats or {}
    return {
        "map": found.map,
        "map_change": change_of(fp32.map, found.map),
        "map50": found.map50,
        **{name: _known(stats.get(name)) for name in _SIZE_STATS},
        "bytes": found.bytes,
        "times_smaller": _ratio(fp32.bytes, found.bytes),
    }


def _own_engine(act: ActRecord, precision: str) -> str | None:
    """Return the engine in which the compression evaluated a model."""
    own = act.evaluation.fp32_engine if precision == "fp32" else None
    return own or act.evaluation.engine


def _half(engines: Sequence[EngineRow], pair: EnginePair | None) -> EngineRow | None:
    """Return the half-precision row to show: FP16 before BF16, INT8's engine before others, then the fastest."""
    rows = [row for row in engines if row.own and row.precision in HALF_PRECISIONS and not row.failure]
    engine = pair[1].engine if pair is not None else None

    def rank(row: EngineRow) -> tuple[bool, bool, float]:
        return row.precision != "fp16", row.engine != engine, row.p50 or 1e9

    return min(rows, key=rank, default=None)


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def change_of(before: float | None, after: float | None) -> float | None:
    """Return after - before; None if one is unknown."""
    return None if before is None or after is None else after - before


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if not before or not after else before / after


def _p50(found: ModelFigures) -> float | None:
    return found.latency_ms["p50"] if found.latency_ms else None
