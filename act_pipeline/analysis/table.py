"""The table of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.tables import text_table


def analysis_table(record: Mapping[str, Any], count: int = 10) -> str:
    """Return a table of the most sensitive ops of an ``analysis.json`` and the shares of the groups.

    Without sensitivities, the table has the ops with the largest ratio of maximum to 99.9 percentile of an activation.

    Args:
        record: an ``analysis.json``.
        count: number of ops.
    """
    ops = {op["name"]: op for op in record["ops"]}
    seconds = f"{len(ops)} ops, {record['images']} calibration images, {sum(record['seconds'].values()):.0f} s in all"
    if not record["ranking"]:

        def reach(op: Mapping[str, Any]) -> float:
            return max(
                (part["abs_max"] / part["p99_9"] for part in op["activations"] if part["p99_9"] > 0), default=1.0
            )

        worst = sorted(ops.values(), key=reach, reverse=True)[:count]
        rows = [[op["module"], op["type"], f"{reach(op):.1f}"] for op in worst]
        return "\n".join([text_table(["widest activations", "op", "largest / 99.9%"], rows), seconds])
    rows = [
        [
            op["module"],
            op["type"],
            f"{op['sqnr_db']:.1f}",
            f"{100 * op['share']:.1f}",
            f"{100 * op['detection_change']:.1f}",
            *([f"{op['map']:.4f}"] if op["map"] is not None else []),
        ]
        for op in (ops[name] for name in record["ranking"][:count])
    ]
    header = ["most sensitive", "op", "SQNR dB", "share %", "detections %", *(["mAP"] if len(rows[0]) > 5 else [])]
    shares = ", ".join(
        f"{group['name']} {100 * group['share']:.1f}% ({group['ops']} ops)"
        for group in sorted(record["groups"], key=lambda group: -group["share"])
    )
    return "\n".join([text_table(header, rows), f"shares of the error: {shares}", seconds])
