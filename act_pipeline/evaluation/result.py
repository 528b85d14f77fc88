"""What a model does on a data set, and its record, ``eval.json``."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import write_record, write_text_atomically
from act_pipeline.engines.interface import Artifact, Engine, location
from act_pipeline.evaluation.coco import Matches

EVAL_SCHEMA = "act_pipeline.eval/1"


@dataclass
class Evaluation:
    """What a model does on a data set.

    Attributes:
        map: mean average precision at IoU 0.50:0.95, all areas, at most 100 detections an image; in [0, 1], -1 if the
            images have no ground truth.
        map50: the same at IoU 0.50.
        stats: the twelve COCO figures by the names in ``STAT_NAMES``; -1 where there is no ground truth (of that size).
        summary: the standard twelve lines that pycocotools prints.
        per_class: class name -> AP at 0.50:0.95; None for a class without ground truth.
        images: how many were evaluated.
        batch_size: images in a timed run.
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` of ``engine.run`` on a whole batch, copies in and out of
            the runtime included, reading and preprocessing not; None: no engine ran alone.
        images_per_second: images / the sum of those times.
        detections: [M, 7] float64: place of the image in ``image_ids`` (ids are no floats: some have more digits), x,
            y, width, height (pixels of the original image), score, category id.
        image_ids: of all images that were evaluated, in ascending order.
        matches: ``detections`` matched with the ground truth; None: not kept (an evaluation of an earlier run).
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
    matches: Matches | None = field(default=None, repr=False, compare=False)

    def as_record(
        self, engine: Engine, model: Artifact | None = None, reader: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return the content of ``eval.json``; ``more`` is added as it is."""
        return {
            **engine_record(engine, model, reader),
            "images": self.images,
            "map": self.map,
            "map50": self.map50,
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
        """Write ``eval.json`` (schema ``act_pipeline.eval/1``)."""
        write_record(path, EVAL_SCHEMA, self.as_record(engine, model, reader, **more))

    def write_detections(self, path: str | os.PathLike[str]) -> None:
        """Write the detections in COCO's result form, as its evaluation servers take them."""
        rows = [
            {
                "image_id": self.image_ids[int(place)],
                "category_id": int(category_id),
                "bbox": [round(float(value), 3) for value in box],
                "score": round(float(score), 6),
            }
            for place, *box, score, category_id in self.detections.tolist()
        ]
        write_text_atomically(path, json.dumps(rows) + "\n")


def engine_record(engine: Engine, model: Artifact | None = None, reader: Any = None) -> dict[str, Any]:
    """Return who ran what on what: the part of ``eval.json`` that is no measurement.

    ``model`` is what was asked for, the folder of a model that was lowered; ``model_bytes`` and ``model_hash`` are of
    the ``artifact`` that the engine loaded.
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
    """Return the hash of the data; None where they are not here, to show a picture or to measure speed."""
    with contextlib.suppress(UserError, AttributeError):
        return reader.fingerprint()
    return None
