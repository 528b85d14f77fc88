"""The record of a report: every figure of the page, taken from other records or computed from the detections."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from act_pipeline.core.command_names import name_commands
from act_pipeline.core.output_folders import BELOW_SUFFIX
from act_pipeline.data.annotations import Annotations
from act_pipeline.evaluation.act_candidates import FloatOp, ModelFigures
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.matching import MIN_SCORE
from act_pipeline.report.curves import RECALLS, Scores, score
from act_pipeline.report.differences import iou_map, most_different, pair_images, summarize
from act_pipeline.report.errors import KINDS, best_threshold, count_errors, judge
from act_pipeline.report.models import before_and_after, change_of, engine_row, model_figures, strategy_row, verdict_of
from act_pipeline.report.pictures import describe
from act_pipeline.report.sensitivity import distributions, sensitivity
from act_pipeline.report.sources import Sources, fastest_pair
from act_pipeline.report.variants import variants

REPORT_SCHEMA = "act_pipeline.report/1"
PICTURES = 6
CLASS_CURVES = 3
# Up to 30 classes are shown in one table; of more, the first 20 are shown and the others are collapsed.
MOST_CLASSES, CLASSES_OF_MORE = 30, 20
# Largest difference of a recorded mAP and the mAP recomputed from the stored detections.
_MAP_TOLERANCE = 1e-6


class ReportReader(Protocol):
    """The part of a reader that a report needs (:class:`act_pipeline.data.Reader` implements it)."""

    path: Any

    def annotations(self, split: str = "eval") -> Annotations:
        """Return the annotation file of a split."""

    def image_dir(self, split: str = "eval") -> Any:
        """Return the folder of a split's images."""


@dataclass(frozen=True)
class ClassRow:
    """AP of a class in both models, its change, and the number of its objects; None where not measured."""

    name: str
    fp32: float | None
    int8: float | None
    change: float | None
    objects: int | None


@dataclass(frozen=True)
class FromDetections:
    """Figures computed from the stored detections of both models; None or empty without detections.

    Attributes:
        scores: ``fp32`` and ``int8`` -> scores and curves.
        objects: class name -> number of objects.
        curves, pairs, iou_map, pictures, errors: the parts of ``report.json`` with these names.
        notes: keys of texts and their values.
    """

    scores: Mapping[str, Scores] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)
    curves: Mapping[str, Any] | None = None
    pairs: Mapping[str, Any] | None = None
    iou_map: Mapping[str, Any] | None = None
    pictures: Sequence[Mapping[str, Any]] = ()
    errors: Mapping[str, Any] | None = None
    notes: Sequence[Mapping[str, Any]] = ()


def build(sources: Sources, reader: ReportReader, name: str) -> dict[str, Any]:
    """Return the content of ``report.json`` (schema ``act_pipeline.report/1``).

    Parts that were not measured are None or empty.

    Args:
        sources: the records.
        reader: the data that the model was evaluated on.
        name: name of the model.

    Raises:
        UserError: the reader's data cannot be read.
    """
    act = sources.act
    measured = _from_detections(sources, reader)
    engines = sources.engine_rows()
    pair = fastest_pair(engines, sources.timed_by_compression())
    fp32 = model_figures(act.fp32, measured.scores.get("fp32"))
    int8 = model_figures(act.int8, measured.scores.get("int8"))
    classes = _per_class(fp32, int8, measured.objects)
    return {
        "artifact": name,
        "sources": sources.files,
        "images": act.evaluation.images,
        "verdict": verdict_of(act, fp32, int8, pair).as_json(),
        "models": [row.as_json() for row in before_and_after(act, fp32, int8, engines, pair)],
        "strategies": [strategy_row(step, act, fp32).as_json() for step in act.steps],
        "engines": [engine_row(row, fp32).as_json() for row in engines],
        "variants": variants(sources.search),
        "per_class": [asdict(row) for row in classes],
        "class_counts": _class_counts(classes),
        "curves": measured.curves,
        "pairs": measured.pairs,
        "iou_map": measured.iou_map,
        "pictures": measured.pictures,
        "errors": measured.errors,
        "sensitivity": sensitivity(sources.analysis),
        "kept": {
            "kept_ops": _ops(act.kept_ops),
            "weight_only_ops": _ops(act.weight_only_ops),
            "given_back": _ops(act.given_back),
        },
        "placement": None if act.placement is None else asdict(act.placement),
        "distributions": distributions(sources.analysis),
        "training": act.training,
        "seconds": _seconds(act.seconds),
        "rerun": _rerun(sources, reader),
        "notes": measured.notes,
        "versions": act.versions,
    }


def _per_class(fp32: ModelFigures, int8: ModelFigures, objects: Mapping[str, int]) -> list[ClassRow]:
    """Return the classes in order of their AP change, the largest loss first, those without ground truth last."""
    before, after = fp32.per_class or {}, int8.per_class or {}
    rows = [
        ClassRow(
            name, before.get(name), after.get(name), change_of(before.get(name), after.get(name)), objects.get(name)
        )
        for name in dict.fromkeys([*before, *after])
    ]
    return sorted(rows, key=lambda row: (row.change is None, row.change or 0.0))


def _ops(found: Sequence[FloatOp]) -> list[dict[str, Any]]:
    """Return the ops that are not entirely in INT8 with all properties; None for those not recorded."""
    return [{("name" if name == "output" else name): value for name, value in asdict(op).items()} for op in found]


def _class_counts(classes: Sequence[ClassRow]) -> dict[str, int]:
    """Return how many classes have AP in both models, how many have a lower AP, and how many are shown at once."""
    changes = [row.change for row in classes if row.change is not None]
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
    evaluated = act.evaluation
    return {
        "config": act.config,
        "overrides": act.overrides,
        "commands": _commands(sources, act.config.get("path") or "config.yml", reader),
        "reader": str(reader.path),
        "engine": evaluated.engine,
        "fp32_engine": evaluated.fp32_engine,
        "device": evaluated.device,
        "threads": evaluated.threads,
        "source_hash": act.source_hash,
        "model_hash": act.model_hash,
        "data_hash": act.data_hash,
    }


def _commands(sources: Sources, config: str, reader: ReportReader) -> list[str]:
    """Return the shell commands that make the model (with overrides, if recorded) and the report."""
    folder, overrides = str(sources.artifact), sources.act.overrides
    # tools/compress.py appends the suffix itself.
    save_dir = folder[: -len(BELOW_SUFFIX)] if folder.endswith(BELOW_SUFFIX) else folder
    compress = ["python", "tools/compress.py", "-c", config, "--save_dir", save_dir]
    report = ["python", "tools/report.py", "--model_path", folder, "--reader_config", str(reader.path)]
    commands = [*compress, *(["-o", *overrides] if overrides else [])], report
    return [name_commands(shlex.join(command)) for command in commands]


def _from_detections(sources: Sources, reader: ReportReader) -> FromDetections:
    """Return the figures computed from both models' detections."""
    if sources.detections is None:
        return FromDetections()
    annotations = reader.annotations("eval")
    images = {image["id"]: image for image in annotations.images}
    image_ids = sources.detections.image_ids
    known = set(sources.detections.known({number: image["file_name"] for number, image in images.items()}))
    if len(known) < len(image_ids):
        return FromDetections(notes=[{"text": "other_data", "images": len(image_ids) - len(known)}])
    before, after = sources.detections.rows["fp32"], sources.detections.rows["int8"]
    if not annotations.boxes:
        return _without_labels(before, after, image_ids, annotations)
    masks = sources.detections.masks
    scores = {
        name: score(annotations, sources.detections.rows[name], image_ids, masks.get(name)) for name in ("fp32", "int8")
    }
    judged = {name: judge(rows, annotations.boxes or (), image_ids) for name, rows in sources.detections.rows.items()}
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
    return FromDetections(
        scores=scores,
        objects=_object_counts(objects, names),
        curves=_curves(scores),
        pairs={"threshold": threshold, **summarize(pairs, threshold)},
        iou_map=iou_map(pairs, sizes, threshold) if sizes else None,
        pictures=[
            describe(images[image_id], pairs[image_id], objects.get(image_id, ()), names, difference, threshold)
            for image_id, difference in most_different(pairs, PICTURES)
        ],
        errors=_errors(judged, threshold),
        notes=_notes(sources.act, scores),
    )


def _without_labels(
    before: np.ndarray, after: np.ndarray, image_ids: Sequence[int], annotations: Annotations
) -> FromDetections:
    """Return the figures that need no ground truth: what the two models detect differently."""
    pairs = pair_images(before, after, image_ids, MIN_SCORE)
    images = {image["id"]: image for image in annotations.images}
    names = dict(zip(annotations.category_ids, annotations.class_names))
    pictures = [
        describe(images[image_id], pairs[image_id], (), names, difference, MIN_SCORE)
        for image_id, difference in most_different(pairs, PICTURES)
    ]
    for picture in pictures:
        for box in picture["boxes"]:
            box["right"] = None
    return FromDetections(pairs={"threshold": MIN_SCORE, **summarize(pairs, MIN_SCORE)}, pictures=pictures)


def _object_counts(objects: Mapping[int, Sequence[Mapping[str, Any]]], names: Mapping[int, str]) -> dict[str, int]:
    counts = dict.fromkeys(names.values(), 0)
    for found in objects.values():
        for box in found:
            if not box["iscrowd"]:
                counts[names[box["category_id"]]] += 1
    return counts


def _curves(scores: Mapping[str, Scores]) -> dict[str, Any] | None:
    fp32, int8 = scores["fp32"], scores["int8"]
    if not fp32.curves:
        return None
    changes = {
        name: change for name, ap in fp32.per_class.items()
        if (change := change_of(ap, int8.per_class.get(name))) is not None
    }  # fmt: skip
    classes = sorted(changes, key=lambda name: -abs(changes[name]))[:CLASS_CURVES]
    return {
        "recall": list(RECALLS),
        "by_iou": {iou: {"fp32": fp32.curves[iou], "int8": int8.curves[iou]} for iou in fp32.curves},
        "by_class": {
            name: {
                "fp32": fp32.class_curves[name],
                "int8": int8.class_curves[name],
                "change": changes[name],
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
        "change": {kind: counts["int8"]["kinds"][kind]["all"] - counts["fp32"]["kinds"][kind]["all"] for kind in KINDS},
        "right_change": counts["int8"]["right"]["all"] - counts["fp32"]["right"]["all"],
    }


def _notes(act: ActRecord, scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    notes = []
    for name, part in (("fp32", act.fp32), ("int8", act.int8)):
        recorded, found = part.map, scores[name].stats["ap"]
        if recorded is not None and found is not None and abs(recorded - found) > _MAP_TOLERANCE:
            notes.append({"text": "other_detections", "model": name.upper(), "found": found, "recorded": recorded})
    return notes
