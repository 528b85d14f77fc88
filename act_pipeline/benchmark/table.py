"""The table of a benchmark."""

from __future__ import annotations

from act_pipeline.benchmark.rows import BenchmarkRecord, Row
from act_pipeline.core.tables import BYTES_PER_MB, figure, megabytes, text_table

_HEADER = ("", "ms p50", "p90", "images/s", "x own fp32", "x Paddle", "mAP", "model MB", "memory MB", "start s")


def benchmark_table(record: BenchmarkRecord) -> str:
    """Return a table with one row per engine; ratios are medians over the rounds, memory is that of the engine."""
    if all(row.miou is None for row in record.rows):
        return text_table(_HEADER, [_cells(row) for row in record.rows])
    return text_table((*_HEADER, "mIoU"), [[*_cells(row), figure(row.miou)] for row in record.rows])


def _cells(row: Row) -> list[str]:
    if row.failure is not None or row.latency_ms is None:
        return [row.label, "failed", *[""] * (len(_HEADER) - 2)]
    ratios = (row.ratio_to_fp32, row.ratio_to_paddle_fp32)
    return [
        row.label,
        f"{row.latency_ms['p50']:.2f}",
        f"{row.latency_ms['p90']:.2f}",
        f"{row.images_per_second:.1f}",
        *(f"{ratio.by_round:.2f}" if ratio else "-" for ratio in ratios),
        figure(row.map),
        megabytes(row.model_bytes),
        f"{row.memory.engine_bytes / BYTES_PER_MB:.0f}" if row.memory else "-",
        f"{row.start_seconds:.1f}",
    ]
