"""Charts as inline SVG that uses the page's colours (light and dark) and keeps text as text.

Text elements are rendered by the browser, which has fonts for all languages, including Chinese, at any screen size.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Placeholder colours for matplotlib, which are replaced by the page's CSS variables afterwards.
INK, MUTED, LINE, FP32, INT8, SURFACE, LOSS = (f"#0102{number:02x}" for number in range(3, 10))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    FP32: "--fp32",
    INT8: "--int8",
    SURFACE: "--surface",
    LOSS: "--loss",
}
_WIDTH, _HEIGHT = 4.5, 3.1
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "act_pipeline",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def pr_curve(
    recalls: Sequence[float],
    fp32: Sequence[float],
    int8: Sequence[float],
    words: Mapping[str, str],
    width: float = _WIDTH,
) -> str:
    """Return a chart of precision over recall for both models.

    Args:
        recalls: recall values.
        fp32, int8: precision at these recalls.
        words: texts for ``recall`` and ``precision``.
        width: width in inches.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(recalls, fp32, color=FP32, linewidth=2.6, label="FP32", alpha=0.75)
        axes.plot(recalls, int8, color=INT8, linewidth=1.5, linestyle=(0, (4, 1.5)), label="INT8")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0.2, 0.4, 0.6, 0.8, 1.0])  # the other axis has a 0 at the same corner
        axes.set_xlabel(words["recall"])
        axes.set_ylabel(words["precision"])
        axes.legend(loc="lower left")

    return _svg(draw, width, _HEIGHT / _WIDTH * width)


def heat_map(grid: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return a chart of the mean IoU over the image plane; dark cells are the lowest.

    Args:
        grid: see :func:`act_pipeline.report.differences.iou_map`.
        words: the text for ``mean_iou``.
    """
    values = np.array([[np.nan if mean is None else mean for mean in line] for line in grid["mean_iou"]], np.float64)

    def draw(figure: Any) -> None:
        import matplotlib

        axes = figure.add_subplot()
        low = min(float(np.nanmin(values)), 0.95)
        shown = np.ma.masked_invalid(values)
        mesh = axes.pcolormesh(shown, vmin=low, vmax=1, cmap=matplotlib.colormaps["cividis"], edgecolors="face")
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for row, column in zip(*np.nonzero(np.isnan(values))):
            axes.plot(column + 0.5, row + 0.5, marker="x", color=LINE, markersize=4, markeredgewidth=0.8)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.9, pad=0.02, aspect=24)
        bar.outline.set_visible(False)
        bar.set_label(words["mean_iou"])

    return _svg(draw)


def training(losses: Sequence[float], evaluations: Sequence[Mapping[str, Any]], words: Mapping[str, str]) -> str:
    """Return a chart of the loss of every iteration and the agreement of every evaluation.

    Args:
        losses: loss by iteration.
        evaluations: entries with ``iteration`` and ``agreement``.
        words: texts for ``iteration``, ``loss`` and ``agreement_with_fp32``.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(range(1, len(losses) + 1), losses, color=MUTED, linewidth=1.1)
        axes.set_xlabel(words["iteration"])
        axes.set_ylabel(words["loss"])
        if evaluations:
            scale = axes.twinx()
            scale.grid(False)
            scale.plot(
                [item["iteration"] for item in evaluations], [item["agreement"] for item in evaluations],
                color=INT8, linewidth=1.4, marker="o", markersize=4,
            )  # fmt: skip
            scale.set_ylabel(words["agreement_with_fp32"], color=INT8)

    return _svg(draw, height=2.6)


def ranges(ops: Sequence[Mapping[str, Any]], words: Mapping[str, str]) -> str:
    """Return a chart of every op's activations: a bar from the 99.9 to the 99.99 percentile, and a line to the maximum.

    Args:
        ops: ops in graph order, each with ``group``, ``p999``, ``p9999``, ``abs_max``.
        words: texts for ``op_place`` and ``magnitude``.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        floor = 1e-6
        low, high, top = (np.maximum([float(op[key]) for op in ops], floor) for key in ("p999", "p9999", "abs_max"))
        places = np.arange(len(ops))
        axes.vlines(places, low, np.maximum(top, low), color=LOSS, linewidth=0.9)
        axes.vlines(places, low, np.maximum(high, low * 1.02), color=INT8, linewidth=2.4)
        axes.scatter(places, low, s=5, color=INK, linewidths=0, zorder=3)
        _logarithmic(axes)
        groups = [op["group"] for op in ops]
        starts = [place for place in places if place == 0 or groups[place] != groups[place - 1]]
        for start, end in zip(starts, [*starts[1:], len(ops)]):
            if start:
                axes.axvline(start - 0.5, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)))
            if end - start > len(ops) / 14:
                axes.text((start + end - 1) / 2, 1.01, groups[start], transform=axes.get_xaxis_transform(),
                          ha="center", va="bottom", color=MUTED, fontsize=8)  # fmt: skip
        axes.set_xlim(-1, len(ops))
        axes.set_xlabel(words["op_place"])
        axes.set_ylabel(words["magnitude"])

    return _svg(draw, width=7.6, height=3.2)


def histogram(
    edges: Sequence[float], counts: Sequence[float], threshold: float | None, words: Mapping[str, str]
) -> str:
    """Return a chart of one tensor's histogram on a logarithmic scale, with the INT8 threshold.

    Args:
        edges: bin edges, one more than ``counts``.
        counts: counts per bin.
        threshold: largest value that INT8 represents; None if unknown.
        words: texts for ``value`` and ``count``.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.stairs(np.maximum(counts, 0), edges, fill=True, color=INT8, alpha=0.85, baseline=0)
        _logarithmic(axes)
        axes.set_ylim(bottom=0.5)
        if threshold is not None:
            axes.axvline(threshold, color=LOSS, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_xlabel(words["value"])
        axes.set_ylabel(words["count"])

    return _svg(draw, 3.5, 2.2)


def pareto(found: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return a chart of mAP over latency, with the Pareto front as a line and the rows' numbers beside the points.

    Rows that were evaluated on fewer images than the others are left out. A number that has no room is left out too.

    Args:
        found: see :func:`act_pipeline.report.variants.variants`.
        words: the text for ``pareto_latency``.
    """
    rows = [row for row in found["rows"] if row["images"] == found["images"] and row["map"] is not None]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for precision, color, marker in (("fp32", FP32, "s"), ("int8", INT8, "o")):
            shown = [row for row in rows if row["precision"] == precision]
            places = [row["latency_ms"] for row in shown], [row["map"] for row in shown]
            axes.plot(*places, marker, markersize=5.5, color=color, label=precision.upper(), zorder=3)
        best = sorted((row for row in rows if row["on_front"]), key=lambda row: row["latency_ms"])
        axes.plot([row["latency_ms"] for row in best], [row["map"] for row in best], color=INK, linewidth=0.9, zorder=2)
        for row in rows:
            if row["chosen"]:
                axes.plot(row["latency_ms"], row["map"], "o", markersize=11, fillstyle="none", color=INK, zorder=3)
        if found["lowest_map"] is not None:
            axes.axhline(found["lowest_map"], color=LOSS, linewidth=1.0, linestyle=(0, (1, 2)))
        axes.margins(0.16)
        axes.set_xlabel(words["pareto_latency"])
        axes.set_ylabel("mAP")
        figure.legend(loc="outside upper right", ncols=2, columnspacing=2.4)
        _number(figure, axes, [(row["latency_ms"], row["map"], str(row["number"])) for row in rows])

    return _svg(draw)


def _number(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a text beside each point, at the first of four places that no other text or point takes."""
    figure.draw_without_rendering()  # sets the limits of the axes
    unit = figure.dpi / 72
    places = axes.transData.transform([point[:2] for point in points]).tolist() if points else []
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in places]
    for (x, y), point in zip(places, points):
        width, height = 7.0 * len(point[2]), 11.0
        for right, up in ((True, False), (True, True), (False, True), (False, False)):
            left, low = (6.0 if right else -6.0 - width), (3.0 if up else -3.0 - height)
            box = (x + left * unit, y + low * unit, x + (left + width) * unit, y + (low + height) * unit)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                axes.annotate(point[2], point[:2], (left + width / 2, low + height / 2), textcoords="offset points",
                              ha="center", va="center", color=MUTED)  # fmt: skip
                break


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    # matplotlib's default 10^x labels are math text in fonts that the page does not have.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: _short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def with_ids(drawing: str, prefix: str) -> str:
    """Return a drawing with ``prefix`` added to its ids, so that they are unique in the page."""
    names = set(re.findall(r'\bid="([^"]+)"', drawing))
    for name in names:
        drawing = drawing.replace(f'id="{name}"', f'id="{prefix}{name}"')
        drawing = drawing.replace(f"url(#{name})", f"url(#{prefix}{name})").replace(f'"#{name}"', f'"#{prefix}{name}"')
    return drawing


def _svg(draw: Any, width: float = _WIDTH, height: float = _HEIGHT) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # The browser renders characters that matplotlib's font lacks; the warnings about them are irrelevant here.
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue())


def _for_page(source: str) -> str:
    """Remove from an SVG what the page defines (fonts, colours, namespaces) or must not have (URLs)."""
    drawing = source[source.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<!--.*?-->", "", drawing, flags=re.DOTALL)
    # A style sheet inside an SVG would apply to the whole page.
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    drawing = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawing).replace("xlink:href", "href")
    drawing = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1 focusable='false'>", drawing, count=1)
    drawing = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawing)
    for color, variable in _VARIABLES.items():
        drawing = drawing.replace(color, f"var({variable})")
    return re.sub(r">\s+<", "><", drawing).strip()
