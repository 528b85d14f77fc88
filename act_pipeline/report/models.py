"""Comparison of models: the verdict, and the rows of the report's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from act_pipeline.core.tables import images_tell, rounded_up
from act_pipeline.report.errors import SIZES
from act_pipeline.report.sources import HALF_PRECISIONS

_SIZE_STATS = tuple(f"ap_{size}" for size in SIZES)


def model_figures(part: Mapping[str, Any], scores: Any) -> dict[str, Any]:
    """Return the figures of one model of an ``act.json``.

    Args:
        part: ``fp32`` or ``int8`` of ``act.json``.
        scores: scores recomputed from the detections, used for entries that older records lack; None if there are none.
    """
    stats = part.get("stats") or (scores.stats if scores else {})
    return {
        "map": part.get("map"),
        "map50": part.get("map50"),
        **{name: _known(stats.get(name)) for name in _SIZE_STATS},
        "bytes": part.get("bytes"),
        "latency_ms": part.get("latency_ms"),
        "per_class": part.get("per_class") or (scores.per_class if scores else {}),
    }


def verdict_of(act: Mapping[str, Any], figures: Mapping[str, Any], pair: Any) -> dict[str, Any]:
    """Return the figures of the verdict: whether INT8 is within the allowed drop, and its size and speed.

    Args:
        act: the content of ``act.json``.
        figures: ``fp32`` and ``int8`` -> the output of :func:`model_figures`.
        pair: the output of :func:`act_pipeline.report.sources.fastest_pair`.
    """
    fp32, int8 = figures["fp32"], figures["int8"]
    change, max_drop = change_of(fp32["map"], int8["map"]), act.get("max_drop")
    if change is None:
        state = "not_measured"
    elif max_drop is None:
        state = "no_limit"
    else:
        state = "holds" if _holds(act, change, max_drop) else "below"
    chosen: Mapping[str, Any] = next((step for step in act.get("steps") or () if step.get("chosen")), {})
    quantized = sum((act.get("quantized_ops") or {}).values())
    return {
        "state": state,
        "map_fp32": fp32["map"],
        "map_int8": int8["map"],
        "map_change": change,
        "max_drop": max_drop,
        **certainty_of(act, max_drop),
        "lowest_map": None if max_drop is None or fp32["map"] is None else fp32["map"] - max_drop,
        "bytes_fp32": fp32["bytes"],
        "bytes_int8": int8["bytes"],
        "times_smaller": _ratio(fp32["bytes"], int8["bytes"]),
        "speed": None if pair is None else {
            "engine": pair[1]["engine"],
            "fp32_engine": pair[0]["engine"],
            "device": pair[1]["device"],
            "fp32_ms": _p50(pair[0]["latency_ms"]),
            "int8_ms": _p50(pair[1]["latency_ms"]),
            "times_as_fast": pair[1]["speed_ratio"],
            "map": pair[1]["map"],
            "in_turns": pair[1]["together"] is not None,
            "batch_size": pair[1]["batch_size"],
        },
        "strategy": chosen.get("name") or act.get("strategy"),
        "quantized": quantized,
        "kept": len(act.get("kept_ops") or ()),
        "quantizable": act.get("quantizable_ops") or quantized + len(act.get("kept_ops") or ()),
    }  # fmt: skip


def _holds(act: Mapping[str, Any], change: float, max_drop: float) -> bool:
    """Return whether INT8 is within ``max_drop`` at the configured confidence; at 0.5 the measured drop decides."""
    confidence, probability = act.get("confidence"), act.get("probability_within_max_drop")
    if confidence is None or confidence == 0.5 or probability is None:
        return -change <= max_drop
    return probability >= confidence


def certainty_of(act: Mapping[str, Any], max_drop: float | None) -> dict[str, Any]:
    """Return the confidence of the mAP change.

    Args:
        act: the content of ``act.json``.
        max_drop: the allowed mAP drop; None for no limit.

    Returns:
        ``interval`` of the change (``low``, ``high``, ``level``, ``resamples``), ``probability`` of a drop within
        ``max_drop``, ``tells``: whether the images decide this, ``images_needed`` (rounded up), and the models'
        ``agreement``; None where not measured.
    """
    found, needed = act.get("map_drop_interval"), act.get("images_needed")
    return {
        "interval": _interval(found),
        "probability": act.get("probability_within_max_drop"),
        "tells": None if found is None or max_drop is None else images_tell(act, max_drop),
        "images_needed": None if needed is None else rounded_up(needed),
        "agreement": act.get("agreement"),
    }


def _interval(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"low": -found["high"], "high": -found["low"], "level": found["level"], "resamples": found["resamples"]}


def before_and_after(
    act: Mapping[str, Any], figures: Mapping[str, Any], engines: Sequence[Mapping[str, Any]], pair: Any
) -> list[dict[str, Any]]:
    """Return rows for FP32, FP16 (or BF16) if it was measured, and INT8, with latencies in the fastest engine for INT8.

    Without a ``pair`` the latencies are those of the two evaluations; no ratio is computed, since these ran at
    different times.

    Args:
        act: the content of ``act.json``.
        figures: ``fp32`` and ``int8`` -> the output of :func:`model_figures`.
        engines: the output of :meth:`act_pipeline.report.sources.Sources.engine_rows`.
        pair: the output of :func:`act_pipeline.report.sources.fastest_pair`.
    """
    fp32 = figures["fp32"]
    rows = []
    for index, (name, part) in enumerate((("FP32", fp32), ("INT8", figures["int8"]))):
        row = _row(name, part, fp32, engine=_own_engine(act, name.lower()) if part["latency_ms"] else None)
        if pair is not None:
            timed = pair[index]
            row.update(latency_ms=_p50(timed["latency_ms"]), times_as_fast=timed["speed_ratio"], engine=timed["engine"])
        rows.append(row)
    quantized = sum((act.get("quantized_ops") or {}).values())
    rows[1].update(
        quantized=quantized, kept=len(act.get("kept_ops") or ()), interval=_interval(act.get("map_drop_interval"))
    )
    half = _half(engines, pair)
    if half is not None:
        figures_of_half = {**half, **{key: (half["stats"] or {}).get(key) for key in _SIZE_STATS}}
        rows.insert(
            1,
            _row(
                half["precision"].upper(), figures_of_half, fp32,
                engine=half["engine"], times_as_fast=half["speed_ratio"],
            ),
        )  # fmt: skip
    return rows


def strategy_row(step: Mapping[str, Any], act: Mapping[str, Any], fp32: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one strategy; it has no speed ratio, since its latency is from its own evaluation.

    Args:
        step: an entry of ``steps`` in ``act.json``.
        act: the content of ``act.json``.
        fp32: the float model's output of :func:`model_figures`.
    """
    stats = step.get("stats") or {}
    return _row(
        str(step.get("name")),
        {**step, **{key: stats.get(key) for key in _SIZE_STATS}},
        fp32,
        engine=_own_engine(act, "int8") if step.get("latency_ms") else None,
        **{key: step.get(key) for key in ("quantized", "kept", "seconds", "meets_max_drop")},
        interval=_interval(step.get("map_drop_interval")),
        chosen=bool(step.get("chosen")),
        note=step.get("note") or None,
        strategy=step.get("strategy"),
        settings=step.get("settings") or {},
    )


def engine_row(row: Mapping[str, Any], fp32: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one engine's measurement.

    Args:
        row: an element of :meth:`act_pipeline.report.sources.Sources.engine_rows`.
        fp32: the float model's output of :func:`model_figures`.
    """
    figures = {**row, **{key: (row["stats"] or {}).get(key) for key in _SIZE_STATS}}
    return _row(
        row["label"], figures, fp32, engine=row["engine"], times_as_fast=row["speed_ratio"], failure=row["failure"]
    )


def _row(name: str, figures: Mapping[str, Any], fp32: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row of the table of models; unknown entries are None."""
    return {
        "name": name,
        "map": figures.get("map"),
        "map_change": change_of(fp32["map"], figures.get("map")),
        "interval": None,
        "map50": figures.get("map50"),
        **{key: _known(figures.get(key)) for key in _SIZE_STATS},
        "bytes": figures.get("bytes"),
        "times_smaller": _ratio(fp32["bytes"], figures.get("bytes")),
        "latency_ms": _p50(figures.get("latency_ms")),
        "times_as_fast": None,
        "engine": None,
        "quantized": None,
        "kept": None,
        "seconds": None,
        "meets_max_drop": None,
        "chosen": False,
        "failure": None,
        "note": None,
        **more,
    }


def _own_engine(act: Mapping[str, Any], precision: str) -> str | None:
    """Return the engine in which the compression evaluated a model."""
    measured = act.get("evaluation") or {}
    return measured.get(f"{precision}_engine") or measured.get("engine")


def _half(engines: Sequence[Mapping[str, Any]], pair: Any) -> Mapping[str, Any] | None:
    """Return the half-precision row to show: FP16 before BF16, INT8's engine before others, then the fastest."""
    rows = [row for row in engines if row["own"] and row["precision"] in HALF_PRECISIONS and not row["failure"]]
    engine = pair[1]["engine"] if pair is not None else None

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        return row["precision"] != "fp16", row["engine"] != engine, _p50(row["latency_ms"]) or 1e9

    return min(rows, key=rank, default=None)


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def change_of(before: float | None, after: float | None) -> float | None:
    """Return after - before; None if one is unknown."""
    return None if before is None or after is None else after - before


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if not before or not after else before / after


def _p50(latency_ms: Mapping[str, float] | None) -> float | None:
    return latency_ms["p50"] if latency_ms else None
