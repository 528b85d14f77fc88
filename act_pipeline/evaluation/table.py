"""The table of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.tables import figure, megabytes, text_table


def evaluation_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row for each ``eval.json``; ratios are relative to the first row.

    MB are those of what the engine loaded, which is named: the Paddle model, or the ONNX file exported from it. Their
    ratio is given between models of the same format only.

    Args:
        records: label of the row -> the content of ``eval.json``.
    """
    first = next(iter(records.values()))
    rows = []
    for label, record in records.items():
        ratio = first["latency_ms"]["p50"] / record["latency_ms"]["p50"]
        rows.append(
            [
                label,
                figure(record["map"]),
                figure(record["map50"]),
                f"{_format(record)} {megabytes(record['model_bytes'])}",
                f"{record['model_bytes'] / first['model_bytes']:.3f}" if _format(record) == _format(first) else "-",
                f"{record['latency_ms']['p50']:.1f}",
                f"{ratio:.2f}",
            ]
        )
    return text_table(["", "mAP", "mAP50", "MB loaded", "size ratio", "ms p50", "speed ratio"], rows)


def _format(record: Mapping[str, Any]) -> str:
    """Return the format of the model that the engine loaded."""
    return "ONNX" if str(record.get("artifact") or "").endswith(".onnx") else "Paddle"
