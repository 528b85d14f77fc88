"""Plots of an analysis: ranges, histograms, sensitivities and error shares."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.atomic_files import write_bytes_atomically

# Okabe and Ito's palette: distinguishable with colour-blindness and in greyscale.
COLORS = {"backbone": "#0072B2", "encoder": "#009E73", "decoder": "#E69F00", "head": "#CC79A7"}
_OTHER_COLOR = "#999999"
_DPI = 120
WORST_OPS = 12
_SHOWN_SENSITIVE = 30
_COLUMNS = 4


def draw_plots(record: Mapping[str, Any], directory: str | os.PathLike[str]) -> list[Path]:
    """Draw an analysis as PNG files.

    Args:
        record: a record of schema ``act_pipeline.analysis/1``.
        directory: an existing folder.

    Returns:
        the paths of ``activations.png`` (a box per op), ``weights.png`` (a box per op, over its weight's channels),
        ``histograms.png`` (activations of the worst ops), and, if sensitivities were measured, ``sensitivity.png`` and
        ``groups.png``. Plots without data are left out.
    """
    folder = Path(directory)
    drawings = {
        "activations.png": lambda: draw_activations(record["ops"]),
        "weights.png": lambda: draw_weights(record["ops"]),
        "histograms.png": lambda: draw_histograms(record["ops"]),
    }
    if record["groups"]:
        drawings["sensitivity.png"] = lambda: draw_sensitivity(record["ops"])
        drawings["groups.png"] = lambda: draw_groups(record["groups"], record["attentions"])
    written = []
    for name, draw in drawings.items():
        figure = draw()
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            write_bytes_atomically(folder / name, buffer.getvalue())
            written.append(folder / name)
    return written


def draw_activations(ops: Sequence[Mapping[str, Any]]) -> Any:
    """Return a figure with a box per op for the absolute values of its widest activation; None without data.

    Boxes are quartiles, whiskers the 1% and 99.9% quantiles, and crosses the largest values.

    Args:
        ops: the ``ops`` of ``analysis.json``.
    """
    rows = []
    for op in ops:
        widest = max(op["activations"], key=lambda part: part["abs_max"], default=None)
        if widest is not None and widest["abs_max"] > 0:
            rows.append((op, {name: widest[name] for name in ("p1", "p25", "p50", "p75", "p99_9", "abs_max")}))
    return _boxes(
        rows, ("p1", "p25", "p50", "p75", "p99_9", "abs_max"), "|activation|: 1%, quartiles, 99.9%; ×: the largest"
    )


def draw_weights(ops: Sequence[Mapping[str, Any]]) -> Any:
    """Return a figure with a box per weight for the largest absolute values of its output channels; None without data.

    Args:
        ops: the ``ops`` of ``analysis.json``.
    """
    rows = [
        (op, op["weight"]["channel_abs_max"])
        for op in ops
        if op["weight"] is not None and op["weight"]["channel_abs_max"] is not None and op["weight"]["abs_max"] > 0
    ]
    return _boxes(
        rows,
        ("min", "p25", "p50", "p75", "max", "max"),
        "largest |weight| of an output channel: least, quartiles, most",
    )


def draw_histograms(ops: Sequence[Mapping[str, Any]], count: int = WORST_OPS) -> Any:
    """Return a figure with histograms of the widest activations of the worst ops; None without data.

    The worst ops are those with the largest error. Where no error was measured, they are those with the largest ratio
    of the largest value to the 99.9% quantile.

    Args:
        ops: the ``ops`` of ``analysis.json``.
        count: maximum number of histograms.
    """
    drawn = [op for op in ops if any(part["abs_max"] > 0 for part in op["activations"])]
    if not drawn:
        return None
    worst = sorted(drawn, key=lambda op: -_badness(op))[:count]
    lines = -(-len(worst) // _COLUMNS)
    figure = _figure(4.0 * _COLUMNS, 2.6 * lines)
    for place, op in enumerate(worst):
        part = max(op["activations"], key=lambda part: part["abs_max"])
        counts, largest = part["histogram"]["counts"], part["histogram"]["max"]
        axes = figure.add_subplot(lines, _COLUMNS, place + 1)
        width = largest / len(counts)
        axes.bar([(at + 0.5) * width for at in range(len(counts))], counts, width, color=_color(op), log=True)
        for value, style in ((part["p99_9"], ":"), (part["threshold"], "-")):
            axes.axvline(value, color="black", linewidth=1, linestyle=style)
        axes.set_title(_short(op["module"]), fontsize=8.5, loc="left")
        axes.tick_params(labelsize=7.5)
        axes.set_yticks([])
    figure.suptitle("|activation|, counts on a log scale; dotted: 99.9%, line: the INT8 threshold", fontsize=10)
    return figure


def draw_sensitivity(ops: Sequence[Mapping[str, Any]], count: int = _SHOWN_SENSITIVE) -> Any:
    """Return a figure with the SQNR and the detection change of the most sensitive ops; None if none was measured.

    Args:
        ops: the ``ops`` of ``analysis.json``.
        count: maximum number of ops.
    """
    measured = sorted((op for op in ops if op.get("error") is not None), key=lambda op: -op["error"])[:count]
    if not measured:
        return None
    figure = _figure(11.0, 1.4 + 0.27 * len(measured))
    places = range(len(measured))
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [100 * op["share"] for op in measured], color=[_color(op) for op in measured])
    left.set_xlabel("share of the error of all ops, %")
    for place, op in enumerate(measured):
        left.text(100 * op["share"], place, f" {op['sqnr_db']:.1f} dB", va="center", fontsize=7.5)
    left.set_xlim(0, 118 * max(max(op["share"] for op in measured), 1e-9))
    right.barh(places, [100 * op["detection_change"] for op in measured], color=[_color(op) for op in measured])
    right.set_xlabel("change of the detections, %")
    left.set_yticks(places, [_short(op["module"], 44) for op in measured], fontsize=7.5)
    left.set_ylim(len(measured) - 0.4, -0.6)
    _legend(figure, measured)
    return figure


def draw_groups(groups: Sequence[Mapping[str, Any]], attentions: Sequence[Mapping[str, Any]]) -> Any:
    """Return a figure with the error shares of the groups and of the attention modules.

    Args:
        groups, attentions: the entries of ``analysis.json``.
    """
    rows = [*groups, *attentions]
    figure = _figure(9.0, 1.0 + 0.32 * len(rows))
    axes = figure.add_subplot()
    colors = [COLORS.get(row["name"], _OTHER_COLOR) for row in rows]
    axes.barh(range(len(rows)), [100 * row["share"] for row in rows], color=colors)
    for place, row in enumerate(rows):
        axes.text(100 * row["share"], place, f" {100 * row['share']:.1f}% ({row['ops']} ops)", va="center", fontsize=8)
    axes.set_xlim(0, 130 * max(max(row["share"] for row in rows), 1e-9))
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if attentions:
        axes.axhline(len(groups) - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("share of the error of all ops, %; attentions are parts of the groups above")
    return figure


def _boxes(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]], names: Sequence[str], label: str) -> Any:
    if not rows:
        return None
    figure = _figure(max(8.0, 0.13 * len(rows) + 2), 5.2)
    axes = figure.add_subplot()
    # A log scale cannot show zeros, and half of the values after a ReLU are 0.
    floor = min(values[names[-1]] for _, values in rows) * 1e-4
    low, q1, middle, q3, high, largest = names
    boxes = axes.bxp(
        [
            {
                "whislo": max(values[low], floor),
                "q1": max(values[q1], floor),
                "med": max(values[middle], floor),
                "q3": max(values[q3], floor),
                "whishi": max(values[high], floor),
                "fliers": [values[largest]],
            }
            for _, values in rows
        ],
        positions=range(len(rows)),
        widths=0.7,
        patch_artist=True,
        flierprops={"marker": "x", "markersize": 3},
        medianprops={"color": "black"},
    )
    for box, (op, _) in zip(boxes["boxes"], rows):
        box.set_facecolor(_color(op))
    axes.set_yscale("log")
    axes.set_ylabel(label, fontsize=8.5)
    axes.set_xticks(range(len(rows)), [_short(op["module"]) for op, _ in rows], rotation=90, fontsize=5.5)
    axes.set_xlim(-1, len(rows))
    axes.yaxis.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, [op for op, _ in rows])
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Any, ops: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patches import Patch

    names = [name for name in COLORS if any(op["group"] == name for op in ops)]
    if names:
        handles = [Patch(color=COLORS[name], label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8.5)


def _badness(op: Mapping[str, Any]) -> float:
    if op.get("error") is not None:
        return float(op["error"])
    return max((part["abs_max"] / part["p99_9"] for part in op["activations"] if part["p99_9"] > 0), default=0.0)


def _color(op: Mapping[str, Any]) -> str:
    return COLORS.get(op["group"], _OTHER_COLOR)


def _short(module: str, length: int = 34) -> str:
    """Return the end of a long module name, which distinguishes ops better than its beginning."""
    return module if len(module) <= length else f"…{module[1 - length :]}"
