"""What a report shows of ``analysis.json``: which ops lose most in INT8, their groups' shares, and what they compute.

Read tolerantly: an analysis may have measured the sensitivity alone, or the distributions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN_OPS, SHOWN_HISTOGRAMS = 20, 6
_UNKNOWN_GROUP = "other"


def sensitivity(analysis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the most sensitive ops and every group's share of the error.

    Ops are ranked by the change of matched detections where that was measured, else by the noise that they add.

    Returns:
        ``measure`` (``detection_change`` or ``noise``), ``count``, ``shown``, ``ops`` (``name``, ``type``, ``module``, ``group``,
        ``sqnr_db``, ``detection_change``, ``value``: by which they are ranked, ``relative``: to the largest),
        ``groups`` (``name``, ``ops``, ``share``); None if nothing was measured.
    """
    ops = [op for op in (analysis or {}).get("ops") or () if isinstance(op, Mapping)]
    by_change = [op for op in ops if _number(op.get("detection_change")) is not None]
    by_noise = [op for op in ops if _number(op.get("sqnr_db")) is not None]
    measure, measured = ("detection_change", by_change) if by_change else ("noise", by_noise)
    if not measured:
        return None
    rows = [
        {
            **{key: op.get(key) for key in ("name", "type", "module")},
            "group": op.get("group") or _UNKNOWN_GROUP,
            "sqnr_db": _number(op.get("sqnr_db")),
            "detection_change": _number(op.get("detection_change")),
            "value": _value(op, measure),
        }
        for op in measured
    ]
    rows.sort(key=lambda row: -row["value"])
    largest = max(rows[0]["value"], 1e-12)
    total = sum(max(row["value"], 0.0) for row in rows)
    for row in rows:
        row["relative"] = max(row["value"], 0.0) / largest
    return {
        "measure": measure,
        "count": len(rows),
        "shown": len(rows[:SHOWN_OPS]),
        "ops": rows[:SHOWN_OPS],
        "groups": _groups((analysis or {}).get("groups") or (), rows, total),
    }


def _value(op: Mapping[str, Any], measure: str) -> float:
    if measure == "detection_change":
        return float(op["detection_change"])
    return 10 ** (-float(op["sqnr_db"]) / 10)


def _groups(recorded: Sequence[Any], rows: Sequence[Mapping[str, Any]], total: float) -> list[dict[str, Any]]:
    found = [
        {
            "name": str(group.get("name") or group.get("group")),
            "ops": group["ops"] if isinstance(group.get("ops"), int) else _length(group.get("ops")),
            "share": _number(group.get("share")),
        }
        for group in recorded if isinstance(group, Mapping) and _number(group.get("share")) is not None
    ]  # fmt: skip
    if not found:
        for name in dict.fromkeys(row["group"] for row in rows):
            values = [max(row["value"], 0.0) for row in rows if row["group"] == name]
            found.append({"name": name, "ops": len(values), "share": sum(values) / total if total else 0.0})
    return sorted(found, key=lambda group: -group["share"])


def distributions(analysis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the range of every op's activations in graph order, and the histograms of the worst.

    Returns:
        ``ops`` (``name``, ``module``, ``group``, ``tensor``, ``p999``, ``p9999``, ``abs_max``, ``outlier_ratio``,
        ``channel_spread``, ``reach``: the largest value in units of the 99.9 percentile), ``worst``: the ops with the
        largest ``reach`` that have a ``histogram`` (``edges``, ``counts``), with their ``threshold``; None if nothing
        was measured.
    """
    rows, drawings = [], []
    for op in (analysis or {}).get("ops") or ():
        if not isinstance(op, Mapping):
            continue
        tensors = [_tensor(op, part) for part in _parts(op)]
        tensors = [tensor for tensor in tensors if tensor is not None]
        if not tensors:
            continue
        widest = max(tensors, key=lambda tensor: tensor["reach"])
        histogram = widest.pop("histogram")
        rows.append(widest)
        if histogram is not None:
            drawings.append({**widest, "histogram": histogram})
    if not rows:
        return None
    drawings.sort(key=lambda row: -row["reach"])
    return {"ops": rows, "worst": drawings[:SHOWN_HISTOGRAMS]}


def _parts(op: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the statistics of an op's activations, which stand in a list, under their tensors' names, or in the op."""
    found = op.get("activations")
    if isinstance(found, Mapping):
        found = [{"tensor": name, **part} for name, part in found.items() if isinstance(part, Mapping)]
    parts = [part for part in found or () if isinstance(part, Mapping)]
    return parts or [op]


def _tensor(op: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any] | None:
    percentiles = part.get("percentiles") if isinstance(part.get("percentiles"), Mapping) else {}
    p999 = _first(part, "p999", "p99_9", "p99.9") or _first(percentiles, "99.9", "p999")
    p9999 = _first(part, "p9999", "p99_99", "p99.99") or _first(percentiles, "99.99", "p9999")
    abs_max = _first(part, "abs_max")
    if abs_max is None and _first(part, "min") is not None and _first(part, "max") is not None:
        abs_max = max(abs(_first(part, "min")), abs(_first(part, "max")))
    if p999 is None or abs_max is None:
        return None
    weight = op.get("weight") if isinstance(op.get("weight"), Mapping) else {}
    return {
        **{key: op.get(key) for key in ("name", "type", "module")},
        "group": op.get("group") or _UNKNOWN_GROUP,
        "tensor": part.get("tensor") or part.get("name") or op.get("name"),
        "p999": p999,
        "p9999": p999 if p9999 is None else p9999,
        "abs_max": abs_max,
        "reach": abs_max / p999 if p999 > 0 else 1.0,
        "outlier_ratio": _first(part, "outlier_ratio"),
        "channel_spread": _first(weight, "channel_spread", "spread") or _first(op, "channel_spread"),
        "threshold": _first(part, "threshold"),
        "histogram": _histogram(part.get("histogram")),
    }


def _histogram(found: Any) -> dict[str, list[float]] | None:
    if not isinstance(found, Mapping):
        return None
    counts, edges = found.get("counts"), found.get("edges")
    if edges is None and counts and _number(found.get("width")) is not None:
        start = _number(found.get("start")) or 0.0
        edges = [start + place * float(found["width"]) for place in range(len(counts) + 1)]
    if edges is None and counts and _number(found.get("min")) is not None and _number(found.get("max")) is not None:
        low, high = float(found["min"]), float(found["max"])
        edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
    if not counts or edges is None or len(edges) != len(counts) + 1:
        return None
    return {"edges": [float(edge) for edge in edges], "counts": [float(count) for count in counts]}


def _first(part: Mapping[str, Any], *names: str) -> float | None:
    return next((value for value in (_number(part.get(name)) for name in names) if value is not None), None)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else None
