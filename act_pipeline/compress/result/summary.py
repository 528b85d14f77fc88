"""The table of a compression: the float model, every INT8 model that was tried, and the chosen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from act_pipeline.compress.result.candidate_details import equalization_line, residuals_line, taken_back_lines
from act_pipeline.core.tables import figure, megabytes, text_table
from act_pipeline.evaluation.act_candidates import Step
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.act_measurements import PlacementRecord
from act_pipeline.evaluation.certainty import certainty_lines
from act_pipeline.evaluation.comparison import Interval

_NAMED_OPS = 4
_LEAST_RATIO = 1.02
_LATENCY_NAMES = {"all": "INT8 everywhere", "placed": "as saved"}


def compression_table(record: Mapping[str, Any]) -> str:
    """Return a table of FP32 and every INT8 model that was tried, and lines about the chosen one.

    MB are those of the Paddle model: program and parameters. The agreement with FP32 is shown where there is no mAP,
    and where ``Strategy.min_agreement`` limits it.

    Args:
        record: the content of an ``act.json``.
    """
    act = ActRecord.from_json(record)
    fp32, evaluated = act.fp32, act.evaluation
    columns = _accuracy_columns(act)
    rows = [["FP32", *(fp32_cell for _, fp32_cell, _ in columns), megabytes(fp32.bytes), "", "", ""]]
    rows += [
        [
            f"{step.name}{' *' if step.chosen else ''}",
            *(cell(step) for _, _, cell in columns),
            megabytes(step.figures.bytes),
            f"{step.figures.bytes / fp32.bytes:.3f}" if step.figures.bytes and fp32.bytes else "-",
            f"{step.quantized}/{act.quantizable_ops}",
            f"{step.seconds:.0f}",
        ]
        for step in act.steps
    ]
    titles = [title for title, _, _ in columns]
    lines = [text_table(["", *titles, "Paddle MB", "ratio", "INT8 ops", "s"], rows)]
    given = [f"{op.module} ({op.output})" for op in act.given_back]
    if given:
        more = f" and {len(given) - _NAMED_OPS} more" if len(given) > _NAMED_OPS else ""
        lines.append(f"reverted to float: {', '.join(given[:_NAMED_OPS])}{more}")
    lines += [equalization_line(act.details["equalization"])] if "equalization" in act.details else []
    lines += [residuals_line(act.details["residuals"])] if "residuals" in act.details else []
    lines += taken_back_lines(act.details["taken_back"]) if "taken_back" in act.details else []
    lines.append(
        f"* kept{_limits(act)}; {evaluated.images} images in "
        f"{evaluated.engine} on the {evaluated.device}; {sum(act.seconds.values()):.0f} s in all"
    )
    lines += certainty_lines(act.comparison, act.max_drop, evaluated.images or 0, act.min_agreement)
    other = act.reference
    if other is not None and other.judged_map is not None:
        lines.append(
            f"cross-check: {other.engine} (Paddle, which rounds wherever the model says so) gives INT8 {other.map:.4f} "
            f"on {other.images} of these images, {evaluated.engine} {other.judged_map:.4f}; 95% interval of the "
            f"difference: {other.low:+.4f} to {other.high:+.4f}"
        )
    if act.latency is not None:
        float_, int8 = act.latency.fp32, act.latency.int8
        lines.append(
            f"there, one image in ms: FP32 {float_.p50_ms:.1f} (90%: {float_.p90_ms:.1f}), INT8 "
            f"{int8.p50_ms:.1f} ({int8.p90_ms:.1f}): {act.latency.ratio:.2f} times as fast"
        )
    if act.placement is not None:
        lines += placement_lines(act.placement)
    elif act.latency is not None and act.latency.ratio < _LEAST_RATIO:
        lines.append(f"INT8 is not faster than FP32 in {evaluated.engine} here; see Strategy.placement")
    return "\n".join(lines)


def placement_lines(found: PlacementRecord) -> list[str]:
    """Return the verdict of a placement by measurement, and what was measured."""
    digits = 1 if found.device is None else 3  # a GPU takes few milliseconds
    latency = ", ".join(
        f"{_LATENCY_NAMES.get(label, label.upper())} {ms:.{digits}f}" for label, ms in found.latency_ms.items()
    )
    images = "one image" if found.batch == 1 else f"{found.batch} images"
    lines = [f"placement: {found.line}", f"  {images} in ms, in turns: {latency}"]
    return lines + [f"  in float: {name} ({count} ops)" for name, count in found.groups.items()]


def _accuracy_columns(act: ActRecord) -> list[tuple[str, str, Callable[[Step], str]]]:
    """Return title, cell of FP32 and cell of a candidate of each column about the accuracy."""
    columns: list[tuple[str, str, Callable[[Step], str]]] = []
    of = "" if act.fp32.miou is None else "mask "
    compared = any(step.comparison.agreement_interval is not None for step in act.steps)
    if act.fp32.map is not None or not compared:
        columns += [
            (f"{of}mAP", figure(act.fp32.map), lambda step: figure(step.figures.map)),
            (f"{of}mAP50", figure(act.fp32.map50), lambda step: figure(step.figures.map50)),
            ("change", "", _change),
        ]
    if act.fp32.miou is not None:
        columns.append(("mIoU", figure(act.fp32.miou), lambda step: figure(step.figures.miou)))
    if compared and (act.fp32.map is None or act.min_agreement is not None):
        columns.append(("agreement", "", _agreement))
    return columns


def _change(step: Step) -> str:
    return "-" if step.map_drop is None else f"{-step.map_drop:+.4f}{_bounds(step.comparison.map_drop_interval)}"


def _agreement(step: Step) -> str:
    found = step.comparison.agreement_interval
    return "-" if found is None else f"{found.value:.4f}, {found.low:.3f} to {found.high:.3f}"


def _limits(act: ActRecord) -> str:
    said = [] if act.max_drop is None else [f"within max_drop {act.max_drop}"]
    said += [] if act.min_agreement is None else [f"at min_agreement {act.min_agreement}"]
    return f", {' and '.join(said)}" if said else ""


def _bounds(found: Interval | None) -> str:
    return "" if found is None else f", {-found.high:+.3f} to {-found.low:+.3f}"
