"""Detections of one image, listed and drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel, ModelFile
from act_pipeline.core.errors import UserError
from act_pipeline.engines import Artifact, Engine
from act_pipeline.evaluation import engine_record
from act_pipeline.inference.outcome import InferenceOutcome, finished
from act_pipeline.inference.request import InferenceRequest


def show_detections(request: InferenceRequest, engine: Engine, model: Artifact, reader: Any) -> InferenceOutcome:
    """List the detections of the request\'s image with a score of at least its threshold, and draw them."""
    from act_pipeline.inference.visualize import detection_label, draw_detections, read_image

    image_file = str(request.image_file)
    read_image(image_file)  # gives a clearer message than the reader if the file is invalid
    bbox = engine.run(reader.preprocess(image_file))["bbox"]
    names = class_names(reader, model)
    output = Path(request.output_dir) / Path(image_file).name
    if output.resolve() == Path(image_file).resolve():
        output = output.with_name(f"{output.stem}_detections{output.suffix}")
    draw_detections(image_file, bbox, names, output, request.threshold)
    shown = bbox[bbox[:, 1] >= request.threshold]
    shown = shown[np.argsort(-shown[:, 1], kind="stable")]
    lines = [
        f"{detection_label(row[0], row[1], names)}  x1 {row[2]:.1f}  y1 {row[3]:.1f}  x2 {row[4]:.1f}  y2 {row[5]:.1f}"
        for row in shown
    ]
    lines.append(f"{len(shown)} detections with a score of at least {request.threshold:g}; picture: {output}")
    record = {
        **engine_record(engine, model, reader),
        "image": image_file,
        "threshold": request.threshold,
        "detections": [
            {"class": int(row[0]), "score": float(row[1]), "bbox": [float(value) for value in row[2:]]} for row in shown
        ],
    }
    return finished(request, InferenceOutcome(lines=lines, detections=shown, picture=output, record=record))


def class_names(reader: Any, model: Artifact) -> Sequence[str]:
    """Return the class names by class index, of the reader if available, otherwise of the model's ``infer_cfg.yml``."""
    with contextlib.suppress(UserError):
        return list(reader.class_names)
    # An exported ONNX file is in onnx/ in the folder of its model.
    folders = [model.directory, model.directory.parent] if isinstance(model, ModelFile) else [model.directory]
    return next(filter(None, (InferenceModel(folder).class_names() for folder in folders)), [])
