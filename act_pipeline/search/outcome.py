"""Result of a search: rows, record, table and picture."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

from act_pipeline.compress.candidates import MEASURED
from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.tables import figure, megabytes, text_table
from act_pipeline.engines.onnx_runtimes.openvino import FLOAT_PRECISION_KEY
from act_pipeline.evaluation.confidence import TOLERANCE
from act_pipeline.search.pareto import front

PICTURE_FILENAME = "search.png"
_SAME_SPEED = 1.02
_COLORS = {"fp32": "#999999", "int8": "#D55E00"}


@dataclass(frozen=True)
class Row:
    """A variant at one precision.

    Attributes:
        name: name of the variant.
        words: the variant in words.
        layers, queries, size: see :class:`act_pipeline.search.variants.Variant`.
        precision: ``fp32`` or ``int8``.
        folder: its model.
        bytes: size of the model.
        map: mAP on the evaluated images.
        images: number of evaluated images.
        map_drop: the full float model's mAP on these images - ``map``.
        low, high: 95% interval of ``map_drop``.
        probability: share of the resampled data sets on which the drop is within ``max_drop``.
        latency_ms: median latency in ms.
        ratio: speed-up over the full model in INT8 (in FP32 for the rows in FP32), median over the rounds.
        dropped: why it was not followed further; None: it was.
        on_front: whether no other row of all images is faster and better.
        agreement: agreement with the full float model on the evaluated images; None: ``min_agreement`` is not set.
        agreement_probability: share of the resampled data sets with at least ``min_agreement``; None: not set.
        bf16: see :class:`act_pipeline.search.variants.Variant`.
    """

    name: str
    words: str
    layers: Optional[int]
    queries: Optional[int]
    size: Sequence[int]
    precision: str
    folder: str
    bytes: int
    map: Optional[float]
    images: int
    map_drop: Optional[float]
    low: Optional[float]
    high: Optional[float]
    probability: Optional[float]
    latency_ms: float
    ratio: float
    dropped: Optional[str] = None
    on_front: bool = False
    agreement: Optional[float] = None
    agreement_probability: Optional[float] = None
    bf16: bool = False

    def agrees(self, min_agreement: Optional[float], confidence: float) -> bool:
        """Return whether the agreement is at least ``min_agreement``, measured and with a probability."""
        if min_agreement is None or self.agreement is None or self.agreement_probability is None:
            return True
        measured = self.agreement >= min_agreement - TOLERANCE
        return measured and (confidence == MEASURED or self.agreement_probability >= confidence)


@dataclass(frozen=True)
class SearchOutcome:
    """Result of a search.

    Attributes:
        rows: all variants, INT8 first, the fastest first.
        chosen: the fastest row within ``max_drop`` and ``min_agreement``; None: there is none.
        max_drop: the largest drop of mAP.
        confidence: the share of resampled data sets on which it has to hold.
        engine: what evaluated and timed.
        seconds: stage -> seconds.
        source: what the search was made from.
        calibration_images: the most images that the INT8 models of the search were calibrated with.
        full_int8: the folder of the full model in INT8, if it was given; None: it was calibrated by ``ptq``.
        min_agreement: the least agreement with the full float model; None: any.
        skipped: variants that were not tried, and for each a larger one that is surely beyond a limit, in words.
    """

    rows: Sequence[Row]
    chosen: Optional[Row]
    max_drop: float
    confidence: float
    engine: str
    seconds: Mapping[str, float]
    source: Mapping[str, Any]
    calibration_images: Optional[int] = None
    full_int8: Optional[str] = None
    min_agreement: Optional[float] = None
    skipped: Sequence[tuple[str, str]] = ()

    @property
    def limits(self) -> str:
        """The limits in words."""
        agreement = "" if self.min_agreement is None else f" and min_agreement {self.min_agreement}"
        return f"max_drop {self.max_drop}{agreement}"

    @property
    def faster(self) -> Optional[Row]:
        """The chosen row if it is another than the full model in INT8, whose ratio is 1."""
        return None if self.chosen is None or self.chosen.ratio == 1 else self.chosen

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``search.json``."""
        return {
            **self.source,
            "engine": self.engine,
            "max_drop": self.max_drop,
            "min_agreement": self.min_agreement,
            "confidence": self.confidence,
            "chosen": None if self.chosen is None else {"name": self.chosen.name, "precision": self.chosen.precision},
            "calibration_images": self.calibration_images,
            "full_int8": self.full_int8,
            "skipped": [{"variant": words, "larger": larger} for words, larger in self.skipped],
            "seconds": dict(self.seconds),
            "rows": [asdict(row) for row in self.rows],
        }

    @property
    def lines(self) -> list[str]:
        """The text to print: the table and what was chosen."""
        return [*self.table, self._conclusion, *self.how_to_ship]

    @property
    def how_to_ship(self) -> list[str]:
        """The line that says which float model to compress for the chosen variant; none if it is the full model."""
        chosen = self.faster
        same = [
            row.folder
            for row in self.rows
            if chosen is not None
            and row.precision == "fp32"
            and (row.layers, row.queries, row.size) == (chosen.layers, chosen.queries, chosen.size)
        ]
        if chosen is None or not same:
            return []
        line = f"; for bf16, with the line '{FLOAT_PRECISION_KEY}: bf16' in its infer_cfg.yml" if chosen.bf16 else ""
        return [f"to ship it, compress its float model, Global.model_dir={same[0]}{line}"]

    @property
    def table(self) -> list[str]:
        """The table, and why variants were dropped."""
        agreed = self.min_agreement is not None
        header = ["", "precision", "ms p50", "x full", "mAP", "change", "images", "MB", ""]
        if agreed:
            header.insert(6, "agreement")
        table = text_table(header, [_cells(row, row is self.chosen, agreed) for row in self.rows])
        lines = [f"mAP and latency in {self.engine}; x full: to the full model at the same precision", "", table, ""]
        if self.full_int8 is not None:
            lines.append(
                f"the full model in INT8 is {self.full_int8}; the variants were calibrated with at most "
                f"{self.calibration_images} images"
            )
        lines += [f"dropped: {row.words}: {row.dropped}" for row in self.rows if row.dropped]
        counts = Counter(larger for _, larger in self.skipped)
        return lines + [f"not tried: {count} smaller than {larger}" for larger, count in counts.items()]

    @property
    def _conclusion(self) -> str:
        chosen = self.faster
        if self.chosen is None:
            more = (
                "" if self.full_int8 else "; the full model was calibrated by ptq, tools/compress.py tries more for it"
            )
            return f"no INT8 model is within {self.limits} of the full float model{more}"
        if chosen is None:
            return f"no variant within {self.limits} is faster than the full model in INT8"
        speed = f"{chosen.ratio:.2f} times as fast as the full model in INT8"
        drop = f"mAP {-(chosen.map_drop or 0.0):+.4f} against the full float model"
        return f"fastest within {self.limits}: {chosen.words}: {speed}, {drop}: {chosen.folder}"


def with_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with ``on_front`` set among those that were evaluated on all images, sorted."""
    most = max((row.images for row in rows), default=0)
    whole = [row for row in rows if row.images == most and row.map is not None]
    best = {id(whole[place]) for place in front([(row.latency_ms, row.map or 0.0) for row in whole])}
    marked = [replace(row, on_front=id(row) in best) for row in rows]
    return sorted(marked, key=lambda row: (row.precision != "int8", row.latency_ms))


def fastest_within(
    rows: Sequence[Row], max_drop: float, confidence: float, min_agreement: Optional[float] = None
) -> Optional[Row]:
    """Return the fastest INT8 row within the limits, measured and with the probability ``confidence``; None: no row.

    Of those that are as fast but for :data:`_SAME_SPEED`, which is less than the machine's noise, it is the best.
    """
    sure = [
        row
        for row in rows
        if row.precision == "int8"
        and row.probability is not None
        and row.probability >= confidence
        and row.map_drop is not None
        and row.map_drop <= max_drop
        and row.agrees(min_agreement, confidence)
    ]
    fastest = max((row.ratio for row in sure), default=0.0)
    near = [row for row in sure if row.ratio * _SAME_SPEED >= fastest]
    return max(near, key=lambda row: (row.map or 0.0, row.ratio), default=None)


def _cells(row: Row, chosen: bool, agreed: bool) -> list[str]:
    mark = "chosen" if chosen else "front" if row.on_front else ""
    change = "-" if row.map_drop is None else f"{-row.map_drop:+.4f}"
    speed = [f"{row.latency_ms:.1f}", f"{row.ratio:.2f}"]
    change_by = [change, figure(row.agreement)] if agreed else [change]
    return [row.words, row.precision, *speed, figure(row.map), *change_by, str(row.images), megabytes(row.bytes), mark]


def draw(outcome: SearchOutcome, path: str | os.PathLike[str]) -> None:
    """Draw mAP over latency of the rows that were evaluated on all images, with the front as a line, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(row.images for row in outcome.rows)
    rows = [row for row in outcome.rows if row.images == most and row.map is not None]
    figure_ = Figure(figsize=(9.0, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure_)
    axes = figure_.add_subplot()
    for precision, color in _COLORS.items():
        shown = [row for row in rows if row.precision == precision]
        if shown:
            places = [row.latency_ms for row in shown], [row.map or 0.0 for row in shown]
            axes.plot(*places, "o", markersize=7, color=color, label=precision, zorder=3)
    best = sorted((row for row in rows if row.on_front), key=lambda row: row.latency_ms)
    line = [row.latency_ms for row in best], [row.map or 0.0 for row in best]
    axes.plot(*line, color="black", linewidth=1.0, label="Pareto front", zorder=2)
    reference = max((row.map or 0.0) + (row.map_drop or 0.0) for row in rows)
    axes.axhline(reference - outcome.max_drop, color="black", linestyle=":", linewidth=1.0, label="max_drop")
    for row in rows:
        label = row.words.partition(", ")[2] or row.words
        axes.annotate(label, (row.latency_ms, row.map or 0.0), (5, 5), textcoords="offset points", fontsize=8.5)
    axes.margins(0.18)
    axes.set_xlabel(f"ms p50 in {outcome.engine}, batch 1")
    axes.set_ylabel(f"mAP, {most} images")
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure_.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())
