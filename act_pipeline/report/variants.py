"""The part of ``search.json`` in a report: the variants of the model that were tried, and the Pareto front.

Rows that lack a figure are left out, since records of another version may have other entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.records import as_number

_LEVEL = 0.95


def variants(search: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the variants that a search tried, as the table and the chart of a report show them.

    Args:
        search: the content of ``search.json``, or None.

    Returns:
        ``rows`` (``number`` from 1, ``name``, ``layers``, ``queries``, ``height``, ``width``, ``bf16``,
        ``precision``, ``latency_ms``, ``times_full``: the speed-up over the full model at the same precision, ``map``,
        ``change`` of the mAP from the full float model's on the same images, ``low`` and ``high``: its interval of
        ``level``, ``images``, ``dropped``, ``on_front``, ``chosen``), in the order of the record; ``images``: the most
        that a row was evaluated on; ``lowest_map``: the full float model's mAP on them - ``max_drop``; ``max_drop``,
        ``confidence``, ``engine``, ``calibration_images``; ``full_given``: whether the full model in INT8 is the result
        of a compression, which need not be calibrated as the others are; ``faster``: the chosen row, if it is not the
        full model; ``any_within``: whether a row was chosen. None if there is no row.
    """
    found = search or {}
    chosen, listed = found.get("chosen"), found.get("rows")
    chosen = chosen if isinstance(chosen, Mapping) else {}
    listed = listed if isinstance(listed, list) else []
    rows = [row for part in listed if isinstance(part, Mapping) and (row := _row(part)) is not None]
    if not rows:
        return None
    for number, row in enumerate(rows, 1):
        row["number"] = number
        row["chosen"] = (row["name"], row["precision"]) == (chosen.get("name"), chosen.get("precision"))
    most = max(row["images"] for row in rows)
    max_drop = as_number(found.get("max_drop"))
    references = [
        row["map"] - (row["change"] or 0.0) for row in rows if row["images"] == most and row["map"] is not None
    ]
    picked = next((row for row in rows if row["chosen"]), None)
    return {
        "rows": rows,
        "images": most,
        "level": _LEVEL,
        "max_drop": max_drop,
        "lowest_map": max(references) - max_drop if references and max_drop is not None else None,
        "confidence": as_number(found.get("confidence")),
        "engine": str(found.get("engine") or ""),
        "calibration_images": as_number(found.get("calibration_images")),
        "full_given": found.get("full_int8") is not None,
        "faster": picked if picked is not None and picked["times_full"] != 1 else None,
        "any_within": picked is not None,
    }


def _row(part: Mapping[str, Any]) -> dict[str, Any] | None:
    latency, ratio, images = (as_number(part.get(key)) for key in ("latency_ms", "ratio", "images"))
    size = part.get("size")
    sides = [as_number(side) for side in size] if isinstance(size, list) else []
    if latency is None or ratio is None or images is None or len(sides) != 2 or None in sides:
        return None
    drop, least, most = (as_number(part.get(key)) for key in ("map_drop", "low", "high"))
    return {
        "name": str(part.get("name")),
        "layers": as_number(part.get("layers")),
        "queries": as_number(part.get("queries")),
        "height": sides[0],
        "width": sides[1],
        "precision": str(part.get("precision")),
        "bf16": part.get("bf16") is True,
        "latency_ms": latency,
        "times_full": ratio,
        "map": as_number(part.get("map")),
        "change": None if drop is None else -drop,
        "low": None if most is None else -most,
        "high": None if least is None else -least,
        "images": images,
        "dropped": bool(part.get("dropped")),
        "on_front": part.get("on_front") is True,
    }
