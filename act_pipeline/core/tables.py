"""Formatting of records as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BYTES_PER_MB = 1e6
_NAMED_OPS = 4


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table, the first column flush left, the others flush right.

    Args:
        header: titles of the columns.
        rows: cells, as many in each row as columns.
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def compression_table(record: Mapping[str, Any]) -> str:
    """Return a table of FP32 and every INT8 model that was tried, and lines about the chosen one.

    Args:
        record: an ``act.json``.
    """
    fp32 = record["fp32"]
    rows = [["FP32", _figure(fp32["map"]), _figure(fp32["map50"]), "", _megabytes(fp32["bytes"]), "", "", ""]]
    for step in record["steps"]:
        drop = step["map_drop"]
        rows.append(
            [
                f"{step['name']}{' *' if step['chosen'] else ''}",
                _figure(step["map"]),
                _figure(step["map50"]),
                "-" if drop is None else f"{-drop:+.4f}{_interval(step.get('map_drop_interval'))}",
                _megabytes(step["bytes"]),
                f"{step['bytes'] / fp32['bytes']:.3f}",
                f"{step['quantized']}/{record['quantizable_ops']}",
                f"{step['seconds']:.0f}",
            ]
        )
    measured, floor = record["evaluation"], record["max_drop"]
    lines = [text_table(["", "mAP", "mAP50", "change", "MB", "ratio", "INT8 ops", "s"], rows)]
    given = [f"{entry['module']} ({entry['output']})" for entry in record["given_back"]]
    if given:
        more = f" and {len(given) - _NAMED_OPS} more" if len(given) > _NAMED_OPS else ""
        lines.append(f"reverted to float: {', '.join(given[:_NAMED_OPS])}{more}")
    lines.append(
        f"* kept{'' if floor is None else f', within max_drop {floor}'}; {measured['images']} images in "
        f"{measured['engine']} on the {measured['device']}; {sum(record['seconds'].values()):.0f} s in all"
    )
    lines += certainty_lines(record, floor, measured["images"])
    other = record.get("reference")
    if other is not None and "judged_map" in other:
        low, high = other["difference"]["low"], other["difference"]["high"]
        lines.append(
            f"{other['engine']}, which computes every Q/DQ in Paddle, gives INT8 {other['map']:.4f} on "
            f"{other['images']} of "
            f"these images, {measured['engine']} {other['judged_map']:.4f} ({low:+.4f} to {high:+.4f})"
        )
    if record.get("latency") is not None:
        fp32_ms, int8_ms = record["latency"]["fp32"], record["latency"]["int8"]
        lines.append(
            f"there, one image in ms: FP32 {fp32_ms['p50_ms']:.1f} (90%: {fp32_ms['p90_ms']:.1f}), INT8 "
            f"{int8_ms['p50_ms']:.1f} ({int8_ms['p90_ms']:.1f}): {record['latency']['ratio']:.2f} times as fast"
        )
    return "\n".join(lines)


def certainty_lines(record: Mapping[str, Any], max_drop: float | None, images: int) -> list[str]:
    """Return lines about the confidence interval of the mAP difference and the agreement of the models' boxes.

    Args:
        record: a record with the keys of :meth:`act_pipeline.evaluation.Comparison.as_record`; older records may lack
            them.
        max_drop: the largest allowed mAP drop; None: any.
        images: number of evaluated images.
    """
    lines = []
    found = record.get("map_drop_interval")
    if found is not None:
        said = (
            f"of {found['resamples']:,} data sets drawn from these images {found['level']:.0%} have a change of "
            f"{-found['high']:+.4f} to {-found['low']:+.4f}"
        )
        probability = record.get("probability_within_max_drop")
        if max_drop is not None and probability is not None:
            said += f", {probability:.1%} a drop of at most {max_drop}"
            if not images_tell(record, max_drop):
                said += f": {images:,} images cannot tell whether INT8 is within it{_more(record['images_needed'])}"
        lines.append(said)
    agreed = record.get("agreement")
    if agreed is not None:
        lines.append(agreement_line(agreed))
    return lines


def images_tell(record: Mapping[str, Any], max_drop: float | None) -> bool:
    """Return whether the confidence interval of the mAP drop is on one side of ``max_drop``.

    Args:
        record: as in :func:`certainty_lines`.
        max_drop: the largest allowed mAP drop; None: any.

    Returns:
        False if the interval contains ``max_drop``; True also without an interval or a ``max_drop``.
    """
    found = record.get("map_drop_interval")
    return found is None or max_drop is None or not found["low"] <= max_drop < found["high"]


def agreement_line(agreed: Mapping[str, Any]) -> str:
    """Return a sentence about how many of the float model's boxes INT8 finds, and how they differ.

    Args:
        agreed: ``boxes`` and ``matched``, if matched also ``mean_iou`` and ``mean_score_change``.
    """
    said = f"of the float model's {agreed['boxes']:,} boxes with a score above 0.3"
    if not agreed["matched"]:
        return f"{said} INT8 finds none" if agreed["boxes"] else f"{said} there is nothing to compare"
    return (
        f"{said} INT8 finds {agreed['matched']:.1%}, with a mean IoU of {agreed['mean_iou']:.4f} and a mean change of "
        f"the score of {agreed['mean_score_change']:.4f}"
    )


def _interval(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f", {-found['high']:+.3f} to {-found['low']:+.3f}"


def _more(images: int | None) -> str:
    return "" if images is None else f", some {rounded_up(images):,} could"


def rounded_up(count: int) -> int:
    """Return an estimate rounded up to its first two digits."""
    step = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // step) * step


def analysis_table(record: Mapping[str, Any], count: int = 10) -> str:
    """Return a table of the most sensitive ops of an ``analysis.json`` and the shares of the groups.

    Without sensitivities, the table has the ops with the largest ratio of maximum to 99.9 percentile of an activation.

    Args:
        record: an ``analysis.json``.
        count: number of ops.
    """
    ops = {op["name"]: op for op in record["ops"]}
    seconds = f"{len(ops)} ops, {record['images']} calibration images, {sum(record['seconds'].values()):.0f} s in all"
    if not record["ranking"]:

        def reach(op: Mapping[str, Any]) -> float:
            return max(
                (part["abs_max"] / part["p99_9"] for part in op["activations"] if part["p99_9"] > 0), default=1.0
            )

        worst = sorted(ops.values(), key=reach, reverse=True)[:count]
        rows = [[op["module"], op["type"], f"{reach(op):.1f}"] for op in worst]
        return "\n".join([text_table(["widest activations", "op", "largest / 99.9%"], rows), seconds])
    rows = [
        [
            op["module"],
            op["type"],
            f"{op['sqnr_db']:.1f}",
            f"{100 * op['share']:.1f}",
            f"{100 * op['detection_change']:.1f}",
            *([f"{op['map']:.4f}"] if op["map"] is not None else []),
        ]
        for op in (ops[name] for name in record["ranking"][:count])
    ]
    header = ["most sensitive", "op", "SQNR dB", "share %", "detections %", *(["mAP"] if len(rows[0]) > 5 else [])]
    shares = ", ".join(
        f"{group['name']} {100 * group['share']:.1f}% ({group['ops']} ops)"
        for group in sorted(record["groups"], key=lambda group: -group["share"])
    )
    return "\n".join([text_table(header, rows), f"shares of the error: {shares}", seconds])


def evaluation_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row for each ``eval.json``; ratios are relative to the first.

    Args:
        records: label of the row -> record.
    """
    first = next(iter(records.values()))
    rows = []
    for label, record in records.items():
        ratio = first["latency_ms"]["p50"] / record["latency_ms"]["p50"]
        rows.append(
            [
                label,
                _figure(record["map"]),
                _figure(record["map50"]),
                _megabytes(record["model_bytes"]),
                f"{record['model_bytes'] / first['model_bytes']:.3f}",
                f"{record['latency_ms']['p50']:.1f}",
                f"{ratio:.2f}",
            ]
        )
    return text_table(["", "mAP", "mAP50", "MB", "size ratio", "ms p50", "speed ratio"], rows)


def benchmark_table(record: Mapping[str, Any]) -> str:
    """Return a table of a ``benchmark.json``; ratios are medians over the rounds, memory is that of the engine.

    Args:
        record: a ``benchmark.json``.
    """
    header = ["", "ms p50", "p90", "images/s", "x own fp32", "x Paddle", "mAP", "model MB", "memory MB", "start s"]
    rows = []
    for row in record["rows"]:
        if row["failure"] is not None:
            rows.append([row["label"], "failed", *[""] * (len(header) - 2)])
            continue
        latency, memory = row["latency_ms"], row["memory"]
        rows.append(
            [
                row["label"],
                f"{latency['p50']:.2f}",
                f"{latency['p90']:.2f}",
                f"{row['images_per_second']:.1f}",
                *(f"{ratio['by_round']:.2f}" if ratio else "-" for ratio in _ratios(row)),
                _figure(row["map"]),
                _megabytes(row["model_bytes"]),
                f"{memory['engine_bytes'] / BYTES_PER_MB:.0f}" if memory else "-",
                f"{row['start_seconds']:.1f}",
            ]
        )
    return text_table(header, rows)


def compress_benchmark_table(record: Mapping[str, Any]) -> str:
    """Return a table of seconds by stage, a column for each tool, and the reason if one failed.

    Args:
        record: a record of ``tools/benchmark_compress.py``.
    """
    rows, found = record["rows"], record["ratios"]
    done = {side: row for side, row in rows.items() if row["failure"] is None}
    stages = list(dict.fromkeys(stage for row in done.values() for stage in row["seconds"]))
    body = [
        [
            stage,
            *(f"{row['seconds'][stage]:.1f}" for row in done.values()),
            *([f"{found[stage]:.1f}" if stage in found else "-"] if found else []),
        ]
        for stage in stages
    ]
    asked = record["request"]
    lines = [text_table(["seconds", *done, *(["ratio"] if found else [])], body)] if done else []
    for side, row in rows.items():
        if row["failure"] is not None:
            lines.append(f"{side} failed: {row['failure']}")
        else:
            maps = ", ".join(f"{value:.4f}" for value in row["evaluations"])
            lines.append(f"{side}: {row['steps']} iterations, mAP {maps or '-'}")
    images = "all images" if asked["eval_images"] is None else f"{asked['eval_images']} images"
    lines.append(f"an evaluation every {asked['eval_iter']} iterations, on {images}; {record['cpus']} CPUs")
    return "\n".join(lines)


def _ratios(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["ratio_to_fp32"], row["ratio_to_paddle_fp32"]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _megabytes(count: int) -> str:
    return f"{count / BYTES_PER_MB:.2f}"
