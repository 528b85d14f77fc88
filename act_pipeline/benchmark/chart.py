"""Charts of a benchmark: latencies as bars, throughput as lines over the loads."""

from __future__ import annotations

import io
import os
from typing import Any

from act_pipeline.benchmark.rows import BenchmarkRecord, Row
from act_pipeline.core.atomic_files import write_bytes_atomically

# Okabe and Ito's palette: distinguishable with colour-blindness and in greyscale.
_COLORS = {"fp32": "#999999", "fp16": "#56B4E9", "bf16": "#0072B2", "int8": "#D55E00"}
_OTHER_COLOR = "#CC79A7"
_DPI, _WIDTH_INCHES, _ROW_INCHES, _FRAME_INCHES = 120, 10.0, 0.44, 1.8
_MARKERS = "os^Dv<>P"
_LOAD_INCHES, _LEGEND_INCHES, _HEIGHT_INCHES = 0.75, 3.6, 5.2
# Space for the figures next to the longest bar, as a share of its length.
_LABEL_ROOM = 0.5


def draw_chart(record: BenchmarkRecord, path: str | os.PathLike[str]) -> None:
    """Draw p50 and p90 latency of every row that ran as PNG, the fastest at the top.

    Args:
        record: the benchmark.
        path: the file; its folder is created if missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = sorted((row for row in record.rows if row.latency_ms), key=lambda row: row.p50)
    figure = Figure(figsize=(_WIDTH_INCHES, _FRAME_INCHES + _ROW_INCHES * len(rows)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    p50 = [row.p50 for row in rows]
    p90 = [row.latency_ms["p90"] for row in rows if row.latency_ms]
    axes.barh(range(len(rows)), p50, height=0.68, color=[_COLORS.get(row.precision, _OTHER_COLOR) for row in rows])
    axes.hlines(range(len(rows)), p50, p90, color="black", linewidth=1.1)
    axes.plot(p90, range(len(rows)), "|", color="black", markersize=9, markeredgewidth=1.3)
    # A single outlying p90 must not compress all bars, so the axis is scaled to at most 1.6 times the longest bar.
    reach = max(p50)
    limit = min(max([reach, *p90]), 1.6 * reach)
    axes.set_xlim(0, (1 + _LABEL_ROOM) * limit)
    for place, row in enumerate(rows):
        end = min(max(p50[place], p90[place]), limit)
        axes.text(end + 0.012 * limit, place, _label(row), va="center", fontsize=9.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=10.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"ms a batch of {record.settings.batch_size}; bar: p50, line: to p90")
    axes.set_title(_title(record), fontsize=10.5, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    shown = [name for name in _COLORS if any(row.precision == name for row in rows)]
    handles = [Patch(color=_COLORS[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9.5)
    _save(figure, path)


def draw_throughput_chart(record: BenchmarkRecord, path: str | os.PathLike[str]) -> None:
    """Draw images per second of every engine at every load as PNG: a line a batch size, over the requests.

    Args:
        record: a benchmark with ``throughput``.
        path: the file; its folder is created if missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in record.throughput if row.images_per_second]
    loads = list(dict.fromkeys((row.batch_size, row.requests) for row in rows))
    labels = sorted({row.label: row.precision for row in rows}.items())
    width = max(_WIDTH_INCHES, _LEGEND_INCHES + _LOAD_INCHES * len(loads))
    figure = Figure(figsize=(width, _HEIGHT_INCHES), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, precision) in enumerate(labels):
        own = {(row.batch_size, row.requests): row.images_per_second or 0.0 for row in rows if row.label == label}
        color, marker = _COLORS.get(precision, _OTHER_COLOR), _MARKERS[number % len(_MARKERS)]
        for place, batch in enumerate(dict.fromkeys(size for size, _ in loads)):
            places = [at for at, found in enumerate(loads) if found[0] == batch and found in own]
            heights = [own[loads[at]] for at in places]
            axes.plot(
                places, heights, color=color, marker=marker, markersize=7, linewidth=1.4, label=None if place else label
            )
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(loads)), [f"{batch}\n{requests}" for batch, requests in loads], fontsize=9.5)
    axes.set_xlabel("batch (above) and parallel requests (below)")
    axes.set_ylabel("images/s, median of the rounds")
    axes.set_title(_title(record), fontsize=10.5, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9.5)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def _label(row: Row) -> str:
    """Return the text next to a bar."""
    parts = [f"{row.p50:.1f} ms"]
    ratio = row.ratio_to_paddle_fp32 or row.ratio_to_fp32
    if ratio is not None:
        parts.append(f"× {ratio.by_round:.2f}")
    if row.map is not None:
        parts.append(f"mAP {row.map:.4f}")
    return "   ".join(parts)


def _title(record: BenchmarkRecord) -> str:
    settings, rows = record.settings, record.rows
    model = record.fp32 or record.int8
    assert model is not None, "a benchmark has at least one model"
    name = os.path.basename(os.path.normpath(model.path))
    height, width = settings.input_shape[-2:]
    batch = "" if record.throughput else f"batch {settings.batch_size}, "
    title = f"{name}, {height} × {width}, {batch}{settings.threads} threads"
    title += f", {record.machine['cpu']}"
    baseline = next((row.ratio_to_paddle_fp32.to for row in rows if row.ratio_to_paddle_fp32), None)
    if baseline is not None:
        return f"{title}\n× : times as fast as {baseline}"
    if any(row.ratio_to_fp32 for row in rows):
        return f"{title}\n× : times as fast as the same engine in fp32"
    return title
