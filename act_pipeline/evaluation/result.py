"""Result of a model on a data set, and its record, ``eval.json``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import Artifact, location
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import write_record
from act_pipeline.engines.interface import Engine
from act_pipeline.evaluation.coco import Matches

EVAL_SCHEMA = "act_pipeline.eval/1"


@dataclass
class Evaluation:
    """Accuracy, latency and detections of a model on a data set.

    Attributes:
        map: mean average precision at IoU 0.50:0.95, all areas, at most 100 detections per image; in [0, 1], -1 if the
            images have no ground truth. The IoU is that of the masks, if the model gives masks.
        map50: the same at IoU 0.50.
        stats: the twelve COCO metrics under the names in ``STAT_NAMES``; -1 where there is no ground truth (of that
            size).
        summary: the twelve lines printed by pycocotools.
        per_class: class name -> AP at IoU 0.50:0.95; None for a class without ground truth.
        images: number of evaluated images.
        batch_size: images per timed run.
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` of ``engine.run`` on a full batch, including copies to
            and from the runtime, excluding reading and preprocessing; None if several engines ran in parallel.
        images_per_second: images / the sum of these durations.
        detections: float64 [M, 7]: index of the image in ``image_ids`` (COCO ids may not fit a float), x, y, width,
            height (pixels of the original image), score, category id.
        image_ids: COCO ids of all evaluated images, in ascending order.
        masks: mask of each detection, COCO's compressed run lengths; None: the model gives none.
        miou: mean IoU of the objects' masks with those that the model makes of their boxes, in [0, 1]; None without
            masks or ground truth.
        matches: ``detections`` matched with the ground truth; None if not stored (an evaluation of an earlier run).
    """

    map: float
    map50: float
    stats: dict[str, float]
    summary: list[str]
    per_class: dict[str, float | None]
    images: int
    batch_size: int
    latency_ms: dict[str, float] | None
    images_per_second: float
    detections: np.ndarray = field(repr=False)
    image_ids: list[int] = field(repr=False)
    masks: list[Any] | None = field(default=None, repr=False)
    miou: float | None = None
    matches: Matches | None = field(default=None, repr=False, compare=False)

    @property
    def has_map(self) -> bool:
        """Whether the images have ground truth, without which there is no mAP."""
        return self.map >= 0

    def figures(self) -> list[str]:
        """Return the accuracy in words: mAP and mAP50, those of masks and their mean IoU if the model gives masks."""
        of = "" if self.masks is None else "mask "
        more = [] if self.miou is None else [f"mIoU {self.miou:.4f}"]
        return [f"{of}mAP {self.map:.4f}", f"{of}mAP50 {self.map50:.4f}", *more]

    def as_record(
        self, engine: Engine, model: Artifact | None = None, reader: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return the content of ``eval.json``.

        Args:
            engine, model, reader: see :func:`engine_record`.
            more: further keys, added unchanged.
        """
        return {
            **engine_record(engine, model, reader),
            "images": self.images,
            "map": self.map if self.has_map else None,
            "map50": self.map50 if self.has_map else None,
            **({} if self.miou is None else {"miou": self.miou}),
            "latency_ms": self.latency_ms,
            "images_per_second": self.images_per_second,
            "batch_size": self.batch_size,
            "stats": self.stats,
            "per_class": self.per_class,
            **more,
        }

    def write_record(
        self,
        path: str | os.PathLike[str],
        engine: Engine,
        model: Artifact | None = None,
        reader: Any = None,
        **more: Any,
    ) -> None:
        """Write ``eval.json`` (schema ``act_pipeline.eval/1``); for the arguments see :meth:`as_record`."""
        write_record(path, EVAL_SCHEMA, self.as_record(engine, model, reader, **more))

    def write_detections(self, path: str | os.PathLike[str]) -> None:
        """Write the detections in COCO's result format, as COCO's evaluation servers accept it."""
        masks = self.masks or [None] * len(self.detections)
        rows = [
            {
                "image_id": self.image_ids[int(place)],
                "category_id": int(category_id),
                "bbox": [round(float(value), 3) for value in box],
                "score": round(float(score), 6),
                **({} if mask is None else {"segmentation": mask}),
            }
            for (place, *box, score, category_id), mask in zip(self.detections.tolist(), masks)
        ]
        write_text_atomically(path, json.dumps(rows) + "\n")


@dataclass(frozen=True)
class EvalRecord:
    """The content of an ``eval.json``, as far as other commands read it; None where it is not in the file.

    Attributes:
        engine, precision, device: of the engine.
        map, map50, miou, stats, latency_ms, batch_size: see :class:`Evaluation`.
        model_bytes, model_hash, artifact: size, hash and path of what the engine loaded.
        model: the model that the user named.
        reader_hash: hash of the data.
        shards: number of processes that evaluated in parallel.
    """

    engine: str
    precision: str
    device: str
    map: float | None = None
    map50: float | None = None
    miou: float | None = None
    stats: Mapping[str, float | None] | None = None
    latency_ms: Mapping[str, float] | None = None
    batch_size: int | None = None
    model_bytes: int | None = None
    model_hash: str | None = None
    artifact: str | None = None
    model: str | None = None
    reader_hash: str | None = None
    shards: int = 1

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> EvalRecord:
        """Read the content of an ``eval.json``; further keys are ignored.

        Raises:
            UserError: the engine, its precision or its device is missing.
        """
        missing = [name for name in ("engine", "precision", "device") if name not in found]
        if missing:
            raise UserError(f"the record of an evaluation lacks {', '.join(missing)}; evaluate again")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


def engine_record(engine: Engine, model: Artifact | None = None, reader: Any = None) -> dict[str, Any]:
    """Return the part of ``eval.json`` that describes the engine, the model, the data and the versions.

    Args:
        engine: the engine that ran.
        model: the model that the user named, e.g. the folder of a model that was exported to ONNX. ``model_bytes`` and
            ``model_hash`` describe the ``artifact`` that the engine loaded.
        reader: the reader of the data; None if there was none.
    """
    artifact = getattr(engine, "artifact", None) or model
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
        "threads": engine.threads,
        **({"engine_settings": dict(engine.settings)} if hasattr(engine, "settings") else {}),
        "model_bytes": artifact.bytes if artifact else None,
        "model_hash": artifact.content_hash() if artifact else None,
        "model": str(location(model or artifact)) if artifact else None,
        "artifact": str(location(artifact)) if artifact else None,
        "reader": str(reader.path) if getattr(reader, "path", None) else None,
        "reader_hash": _data_hash(reader),
        "versions": engine.versions(),
    }


def _data_hash(reader: Any) -> str | None:
    """Return the hash of the data; None if the data are missing, as when only speed or a picture is wanted."""
    with contextlib.suppress(UserError, AttributeError):
        return reader.fingerprint()
    return None
