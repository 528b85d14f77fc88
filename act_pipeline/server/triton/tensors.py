"""Requests and answers as tensors: the contract of the model that Triton serves."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np

from act_pipeline.server.items import Found, Item, Picture, Prepared, Refused
from act_pipeline.server.service import Answer, Request
from act_pipeline.server.settings import Batching, Limits

# What the process of Triton sends for a request: its id, its parameters as JSON, its inputs.
Sent = tuple[str, str, Mapping[str, np.ndarray]]
# Outputs by name, or whether the client is wrong and the reason.
Returned = Union[dict[str, np.ndarray], tuple[bool, str]]


def request_of(sent: Sent) -> Union[Request, Refused]:
    """Return a request of Triton's.

    Args:
        sent: its id (empty: a new one is made), its parameters (``version``, ``threshold``), and its inputs:
            ``picture [N, 1]`` bytes, or ``image [N, 3, H, W]`` float32 with ``im_shape [N, 2]`` and
            ``scale_factor [N, 2]``, which may be missing.
    """
    name, text, inputs = sent
    parameters = _parameters(text)
    version = parameters.get("version")
    if version is not None:
        try:
            version = int(str(version))
        except ValueError:
            return Refused(f"parameter version is {str(version)[:40]!r}, expected a number")
    if ("picture" in inputs) == ("image" in inputs):
        found = ", ".join(inputs) or "none"
        return Refused(f"the inputs are {found}, expected picture (JPEG, PNG), or image with im_shape and scale_factor")
    items: list[Item]
    if "picture" in inputs:
        items = [Picture(_bytes(value)) for value in inputs["picture"].reshape(-1)]
    else:
        images, shapes, factors = (inputs.get(key) for key in ("image", "im_shape", "scale_factor"))
        assert images is not None
        items = [
            Prepared(
                image,
                None if shapes is None else shapes[place],
                None if factors is None else factors[place],
            )
            for place, image in enumerate(images)
        ]
    return Request(name or uuid.uuid4().hex, items, version)


def threshold_of(sent: Sent) -> float:
    """Return the least score that a request asks for; 0: all."""
    try:
        return float(_parameters(sent[1]).get("threshold", 0.0))
    except (TypeError, ValueError):
        return 0.0


def returned(answer: Union[Answer, Refused], threshold: float = 0.0) -> Returned:
    """Return an answer as Triton's process takes it.

    Args:
        answer: the answer to a request of N images.
        threshold: detections with a lower score are left out.

    Returns:
        ``boxes [N, K, 4]`` float32: x1, y1, x2, y2 in pixels of the original image; ``scores [N, K]`` float32;
        ``labels [N, K]`` int32, class indices; the detections of each image are filled up with label -1 and score 0;
        ``version [N, 1]`` int32; ``milliseconds [N, 1]`` float32.
    """
    if isinstance(answer, Refused):
        return answer.by_client, answer.reason
    rows = [_shown(found, threshold) for found in answer.found]
    count, most = len(rows), max((len(found) for found in rows), default=0)
    boxes, scores = np.zeros((count, most, 4), np.float32), np.zeros((count, most), np.float32)
    labels = np.full((count, most), -1, np.int32)
    for place, found in enumerate(rows):
        boxes[place, : len(found)], scores[place, : len(found)] = found[:, 2:], found[:, 1]
        labels[place, : len(found)] = found[:, 0].astype(np.int32)
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": labels,
        "version": np.full((count, 1), answer.version, np.int32),
        "milliseconds": np.array([[found.milliseconds] for found in answer.found], np.float32),
    }


def model_config(name: str, input_size: tuple[int, int], batching: Batching, limits: Limits, instances: int) -> str:
    """Return Triton's ``config.pbtxt`` of the model.

    Args:
        name: the model's name.
        input_size: height and width of ``image``, pixels.
        batching: the batches.
        limits: the queue.
        instances: number of batches that are sent to the server's process at a time.
    """
    height, width = input_size
    inputs = [
        ("picture", "TYPE_STRING", [1]),
        ("image", "TYPE_FP32", [3, height, width]),
        ("im_shape", "TYPE_FP32", [2]),
        ("scale_factor", "TYPE_FP32", [2]),
    ]
    outputs = [
        ("boxes", "TYPE_FP32", [-1, 4]),
        ("scores", "TYPE_FP32", [-1]),
        ("labels", "TYPE_INT32", [-1]),
        ("version", "TYPE_INT32", [1]),
        ("milliseconds", "TYPE_FP32", [1]),
    ]
    lines = [f'name: "{name}"', 'backend: "python"', f"max_batch_size: {batching.max_batch_size}"]
    lines += [_tensor("input", *tensor, " optional: true") for tensor in inputs]
    lines += [_tensor("output", *tensor, "") for tensor in outputs]
    preferred = [size for size in batching.preferred if size <= batching.max_batch_size]
    timeout = int(limits.seconds * 1e6)
    lines.append(
        "dynamic_batching {"
        + "".join(f" preferred_batch_size: {size}" for size in preferred)
        + f" max_queue_delay_microseconds: {batching.max_queue_delay_microseconds}"
        + " default_queue_policy { timeout_action: REJECT allow_timeout_override: true"
        + f" default_timeout_microseconds: {timeout} max_queue_size: {limits.queue} }} }}"
    )
    lines.append(f"instance_group [ {{ kind: KIND_CPU count: {instances} }} ]")
    return "\n".join(lines) + "\n"


def _tensor(kind: str, name: str, data_type: str, dims: Sequence[int], more: str) -> str:
    sizes = ", ".join(map(str, dims))
    return f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: [ {sizes} ]{more} }} ]'


def _shown(found: Found, threshold: float) -> np.ndarray:
    rows = found.bbox[found.bbox[:, 0] >= 0]
    return rows[rows[:, 1] >= threshold] if threshold > 0 else rows


def _parameters(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
