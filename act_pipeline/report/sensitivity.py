"""The part of ``analysis.json`` in a report: the most sensitive ops, the shares of their groups, and distributions.

Missing entries are tolerated, since an analysis may have only sensitivities or only distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from act_pipeline.core.records import as_number

SHOWN_OPS, SHOWN_WIDEST = 20, 6
_UNKNOWN_GROUP = "other"


def sensitivity(analysis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the most sensitive ops, and the shares of groups and attention modules in the error of all ops.

    Ops are ranked by the noise/signal ratio with this op alone in INT8, or by the detection change if only that was
    measured.

    Args:
        analysis: the content of ``analysis.json``, or None.

    Returns:
        ``measure`` (``noise`` or ``detection_change``), ``images``, ``count``, ``shown``, ``ops`` (``name``, ``type``,
        ``module``, ``group``, ``sqnr_db``, ``detection_change``, ``map``, ``value``: the ranking value, ``share`` of
        the sum of all, ``relative``: to the largest), ``groups`` and ``attentions`` (``name``, ``ops``, ``share``);
        None if nothing was measured.
    """
    found = analysis or {}
    ops = [op for op in found.get("ops") or () if isinstance(op, Mapping)]
    by_noise = [op for op in ops if _noise(op) is not None]
    by_change = [op for op in ops if as_number(op.get("detection_change")) is not None]
    measure, measured = ("noise", by_noise) if by_noise else ("detection_change", by_change)
    if not measured:
        return None
    rows: list[dict[str, Any]] = []
    for op in measured:
        value = _noise(op) if measure == "noise" else as_number(op["detection_change"])
        rows.append(
            {
                **{key: op.get(key) for key in ("name", "type", "module")},
                "group": op.get("group") or _UNKNOWN_GROUP,
                **{key: as_number(op.get(key)) for key in ("sqnr_db", "detection_change", "map")},
                "value": max(value or 0.0, 0.0),
            }
        )
    rows.sort(key=lambda row: -row["value"])
    total, largest = sum(row["value"] for row in rows), rows[0]["value"]
    for row in rows:
        row["share"] = row["value"] / total if total else 0.0
        row["relative"] = row["value"] / largest if largest else 0.0
    return {
        "measure": measure,
        "images": (found.get("sensitivity") or {}).get("images"),
        "count": len(rows),
        "shown": len(rows[:SHOWN_OPS]),
        "ops": rows[:SHOWN_OPS],
        "groups": _shares(found.get("groups") or ()) or _groups(rows),
        "attentions": _shares(found.get("attentions") or ()),
    }


def _noise(op: Mapping[str, Any]) -> float | None:
    """Return the noise/signal ratio; None if unknown."""
    error, sqnr_db = as_number(op.get("error")), as_number(op.get("sqnr_db"))
    if error is None and sqnr_db is not None:
        return 10 ** (-sqnr_db / 10)
    return error


def _shares(recorded: Sequence[Any]) -> list[dict[str, Any]]:
    found = [
        {"name": str(part.get("name")), "ops": part.get("ops"), "share": as_number(part.get("share"))}
        for part in recorded if isinstance(part, Mapping) and as_number(part.get("share")) is not None
    ]  # fmt: skip
    return sorted(found, key=lambda part: -part["share"])


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for name in dict.fromkeys(row["group"] for row in rows):
        shares = [row["share"] for row in rows if row["group"] == name]
        groups.append({"name": name, "ops": len(shares), "share": sum(shares)})
    return sorted(groups, key=lambda group: -group["share"])


def distributions(analysis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the range of every op's activations in graph order, and the histograms of the widest ones.

    Args:
        analysis: the content of ``analysis.json``, or None.

    Returns:
        ``ops`` (``name``, ``type``, ``module``, ``group``, ``tensor``, ``p999``, ``p9999``, ``abs_max``,
        ``outlier_ratio``, ``channel_spread`` and ``weight_spread``: largest to median channel, ``threshold``: the
        largest value that INT8 represents, ``reach``: ``abs_max`` / ``p999``), and ``worst``: the ops with the largest
        ``reach``, each with its ``histogram`` (``edges``, ``counts``) or None; None if nothing was measured.
    """
    rows: list[dict[str, Any]] = []
    drawings: list[dict[str, Any]] = []
    for op in (analysis or {}).get("ops") or ():
        if not isinstance(op, Mapping):
            continue
        tensors = [tensor for part in _parts(op) if (tensor := _tensor(op, part)) is not None]
        if not tensors:
            continue
        widest = max(tensors, key=lambda tensor: tensor["reach"])
        histogram = widest.pop("histogram")
        rows.append(widest)
        drawings.append({**widest, "histogram": histogram})
    if not rows:
        return None
    drawings.sort(key=lambda row: -row["reach"])
    return {"ops": rows, "worst": drawings[:SHOWN_WIDEST]}


def _parts(op: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the statistics of an op's activations, recorded as a list, as a mapping by tensor, or in the op itself."""
    found = op.get("activations")
    if isinstance(found, Mapping):
        found = [{"tensor": name, **part} for name, part in found.items() if isinstance(part, Mapping)]
    parts = [part for part in found or () if isinstance(part, Mapping)]
    return parts or [op]


def _tensor(op: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any] | None:
    percentiles = _mapping(part.get("percentiles"))
    p999 = _first(part, "p999", "p99_9", "p99.9") or _first(percentiles, "99.9", "p999")
    p9999 = _first(part, "p9999", "p99_99", "p99.99") or _first(percentiles, "99.99", "p9999")
    abs_max, low, high = (_first(part, name) for name in ("abs_max", "min", "max"))
    if abs_max is None and low is not None and high is not None:
        abs_max = max(abs(low), abs(high))
    if p999 is None or abs_max is None:
        return None
    weight = _mapping(op.get("weight"))
    return {
        **{key: op.get(key) for key in ("name", "type", "module")},
        "group": op.get("group") or _UNKNOWN_GROUP,
        "tensor": part.get("tensor") or part.get("name") or op.get("name"),
        "p999": p999,
        "p9999": p999 if p9999 is None else p9999,
        "abs_max": abs_max,
        "reach": abs_max / p999 if p999 > 0 else 1.0,
        "outlier_ratio": _first(part, "outlier_ratio"),
        "channel_spread": _first(part, "channel_spread"),
        "weight_spread": _first(weight, "channel_spread"),
        "threshold": _first(part, "threshold"),
        "histogram": _histogram(part.get("histogram")),
    }


def _histogram(found: Any) -> dict[str, list[float]] | None:
    if not isinstance(found, Mapping):
        return None
    counts, edges = found.get("counts"), found.get("edges")
    if edges is None and counts and as_number(found.get("width")) is not None:
        start = as_number(found.get("start")) or 0.0
        edges = [start + place * float(found["width"]) for place in range(len(counts) + 1)]
    if edges is None and counts and as_number(found.get("min")) is not None and as_number(found.get("max")) is not None:
        low, high = float(found["min"]), float(found["max"])
        edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)]
    if not counts or edges is None or len(edges) != len(counts) + 1:
        return None
    return {"edges": [float(edge) for edge in edges], "counts": [float(count) for count in counts]}


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _first(part: Mapping[str, Any], *names: str) -> float | None:
    return next((value for value in (as_number(part.get(name)) for name in names) if value is not None), None)
