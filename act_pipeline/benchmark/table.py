"""The table of a benchmark."""

from __future__ import annotations

from act_pipeline.benchmark.rows import BenchmarkRecord, LoadRow, Row, SpeedRatio
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
        *map(_ratio, ratios),
        figure(row.map),
        megabytes(row.model_bytes),
        f"{row.memory.engine_bytes / BYTES_PER_MB:.0f}" if row.memory else "-",
        f"{row.start_seconds:.1f}",
    ]


def throughput_table(record: BenchmarkRecord) -> str:
    """Return a table with one row per engine and load; images/s and ratios are medians over the rounds."""
    peer = any(row.ratio_to_peer for row in record.throughput)
    header = ("", "batch", "requests", "images/s", "ms p50", "p99", "x own fp32", *(("x peer",) if peer else ()))
    return text_table(header, [_load_cells(row, peer) for row in record.throughput])


def _load_cells(row: LoadRow, peer: bool) -> list[str]:
    load = [row.label, str(row.batch_size), str(row.requests or "auto")]
    ratios = (row.ratio_to_fp32, *((row.ratio_to_peer,) if peer else ()))
    if row.failure is not None or row.images_per_second is None or row.latency_ms is None:
        return [*load, "failed", "", "", *("" for _ in ratios)]
    latencies = (f"{row.latency_ms[name]:.2f}" for name in ("p50", "p99"))
    return [*load, f"{row.images_per_second:.2f}", *latencies, *map(_ratio, ratios)]


def _ratio(ratio: SpeedRatio | None) -> str:
    return f"{ratio.by_round:.2f}" if ratio else "-"
