"""Bar chart of a benchmark's rows."""

from __future__ import annotations

import io
import os

from act_pipeline.benchmark.rows import BenchmarkRecord, Row
from act_pipeline.core.atomic_files import write_bytes_atomically

# Okabe and Ito's palette: distinguishable with colour-blindness and in greyscale.
_COLORS = {"fp32": "#999999", "fp16": "#56B4E9", "bf16": "#0072B2", "int8": "#D55E00"}
_OTHER_COLOR = "#CC79A7"
_DPI, _WIDTH_INCHES, _ROW_INCHES, _FRAME_INCHES = 120, 10.0, 0.44, 1.8
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
    title = f"{name}, {height} × {width}, batch {settings.batch_size}, {settings.threads} threads"
    title += f", {record.machine['cpu']}"
    baseline = next((row.ratio_to_paddle_fp32.to for row in rows if row.ratio_to_paddle_fp32), None)
    if baseline is not None:
        return f"{title}\n× : times as fast as {baseline}"
    if any(row.ratio_to_fp32 for row in rows):
        return f"{title}\n× : times as fast as the same engine in fp32"
    return title
