"""Records as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BYTES_PER_MB = 1e6


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: the first column left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def compression_table(record: Mapping[str, Any]) -> str:
    """Return FP32 against INT8 of an ``act.json``, one line each, and what changed."""
    rows = []
    for label, part in (("FP32", record["fp32"]), ("INT8", record["int8"])):
        latency = part.get("latency_ms")
        rows.append([
            label, _figure(part["map"]), _figure(part["map50"]), f"{part['bytes'] / BYTES_PER_MB:.2f}",
            f"{latency['p50']:.1f}" if latency else "-",
        ])
    drop = record["map_drop"]
    rows.append([
        "INT8 against FP32", f"{-drop:+.4f}" if drop is not None else "-", "", f"x {record['bytes_ratio']:.3f}", "",
    ])
    quantized = sum(record["quantized_ops"].values())
    kept = len(record["kept_ops"])
    total = record["seconds"]
    engine = record["evaluation"]
    return "\n".join([
        text_table(["", "mAP", "mAP50", "MB", "ms p50"], rows),
        f"{quantized} ops in INT8, {kept} kept float; measured in Paddle Inference's own kernels on the {engine['device']}, "
        f"{engine['threads']} threads, {engine['images']} images; {sum(total.values()):.0f} s in all",
    ])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
