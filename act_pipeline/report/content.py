"""The record of a report: every figure that a page shows, taken from other records or counted from the detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from act_pipeline.data.annotations import Annotations
from act_pipeline.report.curves import RECALLS, score
from act_pipeline.report.differences import iou_map, most_different, pair_images, summarize
from act_pipeline.report.errors import KINDS, SIZES, best_threshold, count_errors, judge
from act_pipeline.report.pictures import describe
from act_pipeline.report.sensitivity import distributions, sensitivity
from act_pipeline.report.sources import HALF_PRECISIONS, Sources, fastest_pair

REPORT_SCHEMA = "act_pipeline.report/1"
PICTURES = 6
CLASS_CURVES = 3
# Up to so many classes stand in one table; of more, the first stand there and the others behind a click.
MOST_CLASSES, CLASSES_OF_MORE = 30, 20
# Scored anew from the detections that were kept, a mAP is the same but for the rounding of boxes to float32.
_MAP_TOLERANCE = 5e-4
_SIZE_STATS = tuple(f"ap_{size}" for size in SIZES)


class ReportReader(Protocol):
    """What is needed of a reader (:class:`act_pipeline.data.Reader` has it)."""

    path: Any

    def annotations(self, split: str = "eval") -> Annotations:
        """Return the annotation file of a split."""

    def image_dir(self, split: str = "eval") -> Any:
        """Return the folder of its images."""


def build(sources: Sources, reader: ReportReader, name: str) -> dict[str, Any]:
    """Return the content of ``report.json`` (schema ``act_pipeline.report/1``).

    A part for which nothing was measured is None or empty. ``name`` is the model's.

    Raises:
        UserError: the reader's data cannot be read.
    """
    act = sources.act
    measured = _from_detections(sources, reader)
    engines = sources.engine_rows()
    pair = fastest_pair(engines)
    figures = {name: _model_figures(act.get(name) or {}, measured["scores"].get(name)) for name in ("fp32", "int8")}
    classes = _per_class(figures, measured["objects"])
    return {
        "artifact": name,
        "sources": sources.files,
        "images": (act.get("evaluation") or {}).get("images"),
        "verdict": _verdict(act, figures, pair),
        "models": _before_and_after(act, figures, engines, pair),
        "strategies": [_strategy_row(step, act, figures["fp32"]) for step in act.get("steps") or ()],
        "engines": [_engine_row(row, figures["fp32"]) for row in engines],
        "per_class": classes,
        "class_counts": _class_counts(classes),
        "curves": measured["curves"],
        "pairs": measured["pairs"],
        "iou_map": measured["iou_map"],
        "pictures": measured["pictures"],
        "errors": measured["errors"],
        "sensitivity": sensitivity(sources.analysis),
        "kept": {key: _ops(act.get(key) or ()) for key in ("kept_ops", "weight_only_ops", "given_back")},
        "distributions": distributions(sources.analysis),
        "training": act.get("training"),
        "seconds": _seconds(act.get("seconds") or {}),
        "rerun": _rerun(sources, reader),
        "notes": measured["notes"],
        "versions": act.get("versions") or {},
    }


def _model_figures(part: Mapping[str, Any], scores: Any) -> dict[str, Any]:
    stats = part.get("stats") or (scores.stats if scores else {})
    return {
        "map": part.get("map"),
        "map50": part.get("map50"),
        **{name: _known(stats.get(name)) for name in _SIZE_STATS},
        "bytes": part.get("bytes"),
        "latency_ms": part.get("latency_ms"),
        "per_class": part.get("per_class") or (scores.per_class if scores else {}),
    }


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if not before or not after else before / after


def _p50(latency_ms: Mapping[str, float] | None) -> float | None:
    return latency_ms["p50"] if latency_ms else None


def _verdict(act: Mapping[str, Any], figures: Mapping[str, Any], pair: Any) -> dict[str, Any]:
    fp32, int8 = figures["fp32"], figures["int8"]
    change, max_drop = _change(fp32["map"], int8["map"]), act.get("max_drop")
    if change is None:
        state = "not_measured"
    elif max_drop is None:
        state = "no_limit"
    else:
        state = "holds" if -change <= max_drop else "below"
    chosen = next((step for step in act.get("steps") or () if step.get("chosen")), {})
    quantized = sum((act.get("quantized_ops") or {}).values())
    return {
        "state": state,
        "map_fp32": fp32["map"],
        "map_int8": int8["map"],
        "map_change": change,
        "max_drop": max_drop,
        "lowest_map": None if max_drop is None or fp32["map"] is None else fp32["map"] - max_drop,
        "bytes_fp32": fp32["bytes"],
        "bytes_int8": int8["bytes"],
        "times_smaller": _ratio(fp32["bytes"], int8["bytes"]),
        "speed": None if pair is None else {
            "engine": pair[1]["engine"],
            "device": pair[1]["device"],
            "fp32_ms": _p50(pair[0]["latency_ms"]),
            "int8_ms": _p50(pair[1]["latency_ms"]),
            "times_as_fast": pair[1]["speed_ratio"],
            "map": pair[1]["map"],
        },
        "strategy": chosen.get("name") or act.get("strategy"),
        "quantized": quantized,
        "kept": len(act.get("kept_ops") or ()),
        "quantizable": act.get("quantizable_ops") or quantized + len(act.get("kept_ops") or ()),
    }  # fmt: skip


def _row(name: str, figures: Mapping[str, Any], fp32: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row of the table of models; what is not known is None."""
    return {
        "name": name,
        "map": figures.get("map"),
        "map_change": _change(fp32["map"], figures.get("map")),
        "map50": figures.get("map50"),
        **{key: _known(figures.get(key)) for key in _SIZE_STATS},
        "bytes": figures.get("bytes"),
        "times_smaller": _ratio(fp32["bytes"], figures.get("bytes")),
        "latency_ms": _p50(figures.get("latency_ms")),
        "times_as_fast": None,
        "engine": None,
        "quantized": None,
        "kept": None,
        "seconds": None,
        "meets_max_drop": None,
        "chosen": False,
        "failure": None,
        "note": None,
        **more,
    }


def _before_and_after(
    act: Mapping[str, Any], figures: Mapping[str, Any], engines: Sequence[Mapping[str, Any]], pair: Any
) -> list[dict[str, Any]]:
    """Return FP32, FP16 (or BF16) where it was measured, INT8; latencies in the engine that runs INT8 fastest."""
    fp32 = figures["fp32"]
    rows = []
    for index, (name, part) in enumerate((("FP32", fp32), ("INT8", figures["int8"]))):
        row = _row(name, part, fp32, engine=_own_engine(act, name.lower()) if part["latency_ms"] else None)
        if pair is not None:
            timed = pair[index]
            row.update(latency_ms=_p50(timed["latency_ms"]), times_as_fast=timed["speed_ratio"], engine=timed["engine"])
        elif index and fp32["latency_ms"] and part["latency_ms"]:
            row["times_as_fast"] = _ratio(_p50(fp32["latency_ms"]), _p50(part["latency_ms"]))
        rows.append(row)
    rows[0]["times_as_fast"] = 1.0 if rows[0]["latency_ms"] else None
    quantized = sum((act.get("quantized_ops") or {}).values())
    rows[1].update(quantized=quantized, kept=len(act.get("kept_ops") or ()))
    half = _half(engines, pair)
    if half is not None:
        figures_of_half = {**half, **{key: (half["stats"] or {}).get(key) for key in _SIZE_STATS}}
        rows.insert(
            1,
            _row(
                half["precision"].upper(), figures_of_half, fp32,
                engine=half["engine"], times_as_fast=half["speed_ratio"],
            ),
        )  # fmt: skip
    return rows


def _own_engine(act: Mapping[str, Any], precision: str) -> str | None:
    """Return the engine in which the compression itself ran a model."""
    measured = act.get("evaluation") or {}
    return measured.get(f"{precision}_engine") or measured.get("engine")


def _half(engines: Sequence[Mapping[str, Any]], pair: Any) -> Mapping[str, Any] | None:
    """Return the half-precision row to show: FP16 before BF16, in INT8's engine before another, the fastest."""
    rows = [row for row in engines if row["own"] and row["precision"] in HALF_PRECISIONS and not row["failure"]]
    engine = pair[1]["engine"] if pair is not None else None

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        return row["precision"] != "fp16", row["engine"] != engine, _p50(row["latency_ms"]) or 1e9

    return min(rows, key=rank, default=None)


def _strategy_row(step: Mapping[str, Any], act: Mapping[str, Any], fp32: Mapping[str, Any]) -> dict[str, Any]:
    stats = step.get("stats") or {}
    return _row(
        str(step.get("name")),
        {**step, **{key: stats.get(key) for key in _SIZE_STATS}},
        fp32,
        times_as_fast=_ratio(_p50(fp32["latency_ms"]), _p50(step.get("latency_ms"))),
        engine=_own_engine(act, "int8") if step.get("latency_ms") else None,
        **{key: step.get(key) for key in ("quantized", "kept", "seconds", "meets_max_drop")},
        chosen=bool(step.get("chosen")),
        note=step.get("note") or None,
        strategy=step.get("strategy"),
        settings=step.get("settings") or {},
    )


def _engine_row(row: Mapping[str, Any], fp32: Mapping[str, Any]) -> dict[str, Any]:
    figures = {**row, **{key: (row["stats"] or {}).get(key) for key in _SIZE_STATS}}
    return _row(
        row["label"], figures, fp32, engine=row["engine"], times_as_fast=row["speed_ratio"], failure=row["failure"]
    )


def _per_class(figures: Mapping[str, Any], objects: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the classes, the largest loss first, those without ground truth last."""
    before, after = figures["fp32"]["per_class"], figures["int8"]["per_class"]
    rows = [
        {
            "name": name,
            "fp32": before.get(name),
            "int8": after.get(name),
            "change": _change(before.get(name), after.get(name)),
            "objects": objects.get(name),
        }
        for name in dict.fromkeys([*before, *after])
    ]
    return sorted(rows, key=lambda row: (row["change"] is None, row["change"] or 0.0))


def _ops(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Return ops that are not wholly in INT8, with all that is said of any of them; None where it is not."""
    names = ("name", "type", "module", "group", "reason", "sensitivity", "map_after")
    return [
        {**{name: op.get(name) for name in names}, "name": op.get("output") or op.get("name")} for op in found
    ]


def _class_counts(classes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many classes have AP in both models, how many lose, and how many a page shows at once."""
    changes = [row["change"] for row in classes if row["change"] is not None]
    shown = len(classes) if len(classes) <= MOST_CLASSES else CLASSES_OF_MORE
    return {
        "known": len(changes),
        "lower": sum(change < 0 for change in changes),
        "shown": shown,
        "hidden": len(classes) - shown,
    }


def _seconds(seconds: Mapping[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    stages = [
        {"stage": stage, "seconds": value, "share": value / total if total else None}
        for stage, value in seconds.items()
    ]
    return {"stages": stages, "total": total if stages else None}


def _rerun(sources: Sources, reader: ReportReader) -> dict[str, Any]:
    act = sources.act
    return {
        "config": act.get("config") or {},
        "reader": str(reader.path),
        "device": (act.get("evaluation") or {}).get("device"),
        "threads": (act.get("evaluation") or {}).get("threads"),
        "source_hash": act.get("source_hash"),
        "model_hash": act.get("model_hash"),
        "data_hash": act.get("data_hash") or {},
    }


def _from_detections(sources: Sources, reader: ReportReader) -> dict[str, Any]:
    """Return what is counted from the detections of both models, and ``notes``: keys of texts, with their figures."""
    nothing: dict[str, Any] = {
        "scores": {}, "objects": {}, "curves": None, "pairs": None, "iou_map": None, "pictures": [], "errors": None,
        "notes": [],
    }  # fmt: skip
    if sources.detections is None:
        return nothing
    annotations = reader.annotations("eval")
    images = {image["id"]: image for image in annotations.images}
    before, after = sources.detections["fp32"], sources.detections["int8"]
    found = {int(image_id) for rows in (before, after) for image_id in set(rows[:, 0].tolist())}
    strangers = found - set(images)
    if strangers:
        return {**nothing, "notes": [{"text": "other_data", "images": len(strangers)}]}
    image_ids = _evaluated(images, found, (sources.act.get("evaluation") or {}).get("images"), reader)
    known = set(image_ids)
    scores = {"fp32": score(annotations, before, image_ids), "int8": score(annotations, after, image_ids)}
    judged = {name: judge(rows, annotations.boxes or (), image_ids) for name, rows in sources.detections.items()}
    threshold = best_threshold(judged["fp32"])
    pairs = pair_images(before, after, image_ids, threshold)
    names = dict(zip(annotations.category_ids, annotations.class_names))
    objects: dict[int, list[dict[str, Any]]] = {}
    for box in annotations.boxes or ():
        if box["image_id"] in known:
            objects.setdefault(box["image_id"], []).append(box)
    sizes = {
        image_id: (image["width"], image["height"])
        for image_id, image in images.items() if image.get("width") and image.get("height")
    }  # fmt: skip
    return {
        "scores": scores,
        "objects": _object_counts(objects, names),
        "curves": _curves(scores),
        "pairs": {"threshold": threshold, **summarize(pairs, threshold)},
        "iou_map": iou_map(pairs, sizes, threshold) if sizes else None,
        "pictures": [
            describe(images[image_id], pairs[image_id], objects.get(image_id, ()), names, difference, threshold)
            for image_id, difference in most_different(pairs, PICTURES)
        ],
        "errors": _errors(judged, threshold),
        "notes": _notes(sources.act, scores),
    }


def _evaluated(
    images: Mapping[int, Mapping[str, Any]], found: set[int], count: int | None, reader: ReportReader
) -> list[int]:
    """Return the images that were evaluated: those with detections, and those that are there and have none."""
    if len(found) == count:
        return sorted(found)
    folder = Path(reader.image_dir("eval"))
    return sorted(found | {image_id for image_id, image in images.items() if (folder / image["file_name"]).is_file()})


def _object_counts(objects: Mapping[int, Sequence[Mapping[str, Any]]], names: Mapping[int, str]) -> dict[str, int]:
    counts = dict.fromkeys(names.values(), 0)
    for found in objects.values():
        for box in found:
            if not box["iscrowd"]:
                counts[names[box["category_id"]]] += 1
    return counts


def _curves(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    fp32, int8 = scores["fp32"], scores["int8"]
    if not fp32.curves:
        return None
    changes = {
        name: abs(int8.per_class[name] - ap) for name, ap in fp32.per_class.items()
        if ap is not None and int8.per_class.get(name) is not None
    }  # fmt: skip
    classes = sorted(changes, key=lambda name: -changes[name])[:CLASS_CURVES]
    return {
        "recall": list(RECALLS),
        "by_iou": {iou: {"fp32": fp32.curves[iou], "int8": int8.curves[iou]} for iou in fp32.curves},
        "by_class": {
            name: {
                "fp32": fp32.class_curves[name],
                "int8": int8.class_curves[name],
                "change": int8.per_class[name] - fp32.per_class[name],
            }
            for name in classes
        },
        "ap": {
            "0.50": {"fp32": fp32.stats["ap50"], "int8": int8.stats["ap50"]},
            "0.75": {"fp32": fp32.stats["ap75"], "int8": int8.stats["ap75"]},
        },
    }


def _errors(judged: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    counts = {name: count_errors(judged[name], threshold) for name in ("fp32", "int8")}
    totals = {name: sum(found["kinds"][kind]["all"] for kind in KINDS) for name, found in counts.items()}
    return {
        "threshold": threshold,
        **counts,
        "total": {**totals, "change": totals["int8"] - totals["fp32"]},
        "change": {
            kind: counts["int8"]["kinds"][kind]["all"] - counts["fp32"]["kinds"][kind]["all"] for kind in KINDS
        },
        "right_change": counts["int8"]["right"]["all"] - counts["fp32"]["right"]["all"],
    }


def _notes(act: Mapping[str, Any], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    notes = []
    for name in ("fp32", "int8"):
        recorded, found = (act.get(name) or {}).get("map"), scores[name].stats["ap"]
        if recorded is not None and found is not None and abs(recorded - found) > _MAP_TOLERANCE:
            notes.append({"text": "other_detections", "model": name.upper(), "found": found, "recorded": recorded})
    return notes
