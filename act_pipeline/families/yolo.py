"""YOLOv5 to v8 and v11 that end with all boxes of all levels in one array, before NMS."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from act_pipeline.families.interface import (
    Detections,
    Geometry,
    Part,
    PostProcess,
    RawOutputs,
    Shapes,
    joined,
    weighted,
)
from act_pipeline.families.nms import corners, multiclass_nms

# Exports with NMS inside have 100 to 300 rows of six numbers; the smallest input of a YOLO has more boxes.
_MOST_AFTER_NMS = 1000


class Yolo:
    """One array of boxes (cx, cy, w, h in pixels of the input) and scores after the sigmoid.

    ``[N, 4 + C, A]``: v8, v11 and Ultralytics' v5u. ``[N, A, 5 + C]``: v5, v6 and v7; column 4 is the objectness, which
    multiplies the scores.
    """

    name = "yolo"
    archs: tuple[str, ...] = ("yolov5", "yolov6", "yolov7", "yolov8", "yolov11", "yolo11", "yolov5u")
    outputs = "one array [N, 4 + C, A] (v8, v11) or [N, A, 5 + C] (v5, v6, v7) of boxes before NMS"

    def fits(self, shapes: Shapes) -> bool:
        if len(shapes) != 1:
            return False
        (shape,) = shapes.values()
        if len(shape) != 3 or min(shape[1:]) < 5:
            return False
        return not (shape[2] == 6 and shape[1] <= _MOST_AFTER_NMS)

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        boxes, scores = _read(outputs, None)
        return weighted(scores, boxes / max(geometry.input_size))

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs:
        ((name, shape),) = shapes.items()
        if has_objectness(shape, num_classes):
            return RawOutputs(Part(name, 2, 5), Part(name, 2, 0, 4), Part(name, 2, 4, 5))
        return RawOutputs(Part(name, 1, 4), Part(name, 1, 0, 4))

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        boxes, scores = _read(outputs, post.num_classes)
        images = []
        for image in range(len(boxes)):
            # NMS in pixels of the input, as these detectors' own post-process does.
            rows = multiclass_nms(corners(boxes[image]), scores[image], post)
            rows[:, 2:] = geometry.to_original(rows[:, 2:], image, post.clip)
            images.append(rows)
        return joined(images)


def _read(outputs: Mapping[str, np.ndarray], num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes [N, A, 4] (cx, cy, w, h in pixels of the input) and scores [N, A, C], float32."""
    (array,) = (np.asarray(array, np.float32) for array in outputs.values())
    if has_objectness(array.shape, num_classes):
        return array[..., :4], array[..., 5:] * array[..., 4:5]
    array = array.transpose(0, 2, 1)
    return array[..., :4], array[..., 4:]


def has_objectness(shape: tuple[int, ...], num_classes: int | None) -> bool:
    """Return whether the array is [N, A, 5 + C] rather than [N, 4 + C, A].

    Args:
        shape: its shape.
        num_classes: C; None: not known, then the longer axis is that of the boxes.
    """
    if num_classes is not None:
        first, second = shape[1] == 4 + num_classes, shape[2] == 5 + num_classes
        if first != second:
            return second
    return shape[1] > shape[2]


FAMILY = Yolo()
