"""A picture as an HTTP request of KServe v2, and the answer to it."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.server.settings import MODEL_NAME

INFER_PATH = f"/v2/models/{MODEL_NAME}/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
_OUTPUTS = ("boxes", "scores", "labels", "version", "milliseconds")


@dataclass(frozen=True)
class Detected:
    """The answer for one picture.

    Attributes:
        version: the version that answered.
        milliseconds: how long the engine took.
        detections: ``class`` (index), ``label``, ``score`` and ``box`` (x1, y1, x2, y2 in pixels) of each.
    """

    version: int
    milliseconds: float
    detections: list[dict[str, Any]]


def picture_request(
    data: bytes, request_id: str, threshold: float = 0.0, version: Optional[int] = None
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a request.

    Args:
        data: a JPEG or PNG file.
        request_id: the request's id.
        threshold: the least score.
        version: the version; None: as the shares say.
    """
    parameters: dict[str, Any] = {"threshold": str(threshold)}
    if version is not None:
        parameters["version"] = version
    element = struct.pack("<I", len(data)) + data
    picture = {
        "name": "picture",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(element)},
    }
    content = {
        "id": request_id,
        "parameters": parameters,
        "inputs": [picture],
        "outputs": [{"name": name, "parameters": {"binary_data": False}} for name in _OUTPUTS],
    }
    header = json.dumps(content).encode()
    return header + element, {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}


def detected(body: bytes, classes: Sequence[str]) -> Detected:
    """Return the answer to :func:`picture_request`.

    Args:
        body: of the response, JSON.
        classes: names by class index.

    Raises:
        ValueError, KeyError: it is no answer.
    """
    outputs = {output["name"]: output["data"] for output in json.loads(body)["outputs"]}
    boxes = outputs["boxes"]
    return Detected(
        int(outputs["version"][0]),
        float(outputs["milliseconds"][0]),
        [
            detection(label, score, boxes[4 * place : 4 * place + 4], classes)
            for place, (label, score) in enumerate(zip(outputs["labels"], outputs["scores"]))
        ],
    )


def detection(label: float, score: float, box: Sequence[float], classes: Sequence[str]) -> dict[str, Any]:
    """Return one detection for JSON."""
    index = int(label)
    name = classes[index] if 0 <= index < len(classes) else str(index)
    return {"class": index, "label": name, "score": float(score), "box": [float(edge) for edge in box]}
