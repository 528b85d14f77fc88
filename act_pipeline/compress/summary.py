"""The table of a compression: the float model, every INT8 model that was tried, and the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.tables import figure, megabytes, text_table
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.certainty import certainty_lines
from act_pipeline.evaluation.comparison import DropInterval

_NAMED_OPS = 4


def compression_table(record: Mapping[str, Any]) -> str:
    """Return a table of FP32 and every INT8 model that was tried, and lines about the chosen one.

    MB are those of the Paddle model: program and parameters.

    Args:
        record: the content of an ``act.json``.
    """
    act = ActRecord.from_json(record)
    fp32, evaluated = act.fp32, act.evaluation
    rows = [["FP32", figure(fp32.map), figure(fp32.map50), "", megabytes(fp32.bytes), "", "", ""]]
    rows += [
        [
            f"{step.name}{' *' if step.chosen else ''}",
            figure(step.figures.map),
            figure(step.figures.map50),
            "-" if step.map_drop is None else f"{-step.map_drop:+.4f}{_bounds(step.comparison.map_drop_interval)}",
            megabytes(step.figures.bytes),
            f"{step.figures.bytes / fp32.bytes:.3f}" if step.figures.bytes and fp32.bytes else "-",
            f"{step.quantized}/{act.quantizable_ops}",
            f"{step.seconds:.0f}",
        ]
        for step in act.steps
    ]
    lines = [text_table(["", "mAP", "mAP50", "change", "Paddle MB", "ratio", "INT8 ops", "s"], rows)]
    given = [f"{op.module} ({op.output})" for op in act.given_back]
    if given:
        more = f" and {len(given) - _NAMED_OPS} more" if len(given) > _NAMED_OPS else ""
        lines.append(f"reverted to float: {', '.join(given[:_NAMED_OPS])}{more}")
    lines.append(
        f"* kept{'' if act.max_drop is None else f', within max_drop {act.max_drop}'}; {evaluated.images} images in "
        f"{evaluated.engine} on the {evaluated.device}; {sum(act.seconds.values()):.0f} s in all"
    )
    lines += certainty_lines(act.comparison, act.max_drop, evaluated.images or 0)
    other = act.reference
    if other is not None and other.judged_map is not None:
        lines.append(
            f"{other.engine}, which computes every Q/DQ in Paddle, gives INT8 {other.map:.4f} on {other.images} of "
            f"these images, {evaluated.engine} {other.judged_map:.4f} ({other.low:+.4f} to {other.high:+.4f})"
        )
    if act.latency is not None:
        float_, int8 = act.latency.fp32, act.latency.int8
        lines.append(
            f"there, one image in ms: FP32 {float_.p50_ms:.1f} (90%: {float_.p90_ms:.1f}), INT8 "
            f"{int8.p50_ms:.1f} ({int8.p90_ms:.1f}): {act.latency.ratio:.2f} times as fast"
        )
    return "\n".join(lines)


def _bounds(found: DropInterval | None) -> str:
    return "" if found is None else f", {-found.high:+.3f} to {-found.low:+.3f}"
