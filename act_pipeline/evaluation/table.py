"""The table of evaluations."""

from __future__ import annotations

from collections.abc import Mapping

from act_pipeline.core.tables import figure, megabytes, text_table
from act_pipeline.evaluation.result import EvalRecord


def evaluation_table(records: Mapping[str, EvalRecord]) -> str:
    """Return a table with a row for each ``eval.json``; ratios are relative to the first row.

    MB are those of what the engine loaded, which is named: the Paddle model, or the ONNX file exported from it. Their
    ratio is given between models of the same format only.

    Args:
        records: label of the row -> the evaluation.
    """
    first = next(iter(records.values()))
    rows = []
    for label, record in records.items():
        size, whole = record.model_bytes, first.model_bytes if _format(record) == _format(first) else None
        p50, base = _p50(record), _p50(first)
        rows.append(
            [
                label,
                figure(record.map),
                figure(record.map50),
                f"{_format(record)} {megabytes(record.model_bytes)}",
                f"{size / whole:.3f}" if size and whole else "-",
                "-" if p50 is None else f"{p50:.1f}",
                "-" if p50 is None or base is None else f"{base / p50:.2f}",
            ]
        )
    return text_table(["", "mAP", "mAP50", "MB loaded", "size ratio", "ms p50", "speed ratio"], rows)


def _format(record: EvalRecord) -> str:
    """Return the format of the model that the engine loaded."""
    return "ONNX" if (record.artifact or "").endswith(".onnx") else "Paddle"


def _p50(record: EvalRecord) -> float | None:
    return record.latency_ms["p50"] if record.latency_ms else None
