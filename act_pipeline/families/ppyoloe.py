"""PP-YOLOE and PP-YOLOE+ of PaddleDetection, exported without NMS (``exclude_nms`` or ``exclude_post_process``)."""

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
from act_pipeline.families.nms import multiclass_nms

_MOST_AFTER_NMS = 1000
_BOXES_OF_32_PIXELS = 16 + 4 + 1  # strides of 8, 16 and 32


class PPYoloe:
    """Boxes (x1, y1, x2, y2) and scores before NMS, in one of two layouts.

    ``exclude_nms``: boxes [N, A, 4] in pixels of the original image, and scores [N, C, A]. ``exclude_post_process``:
    one array [N, A, 4 + C], A > 4 + C, with boxes in pixels of the input; YOLOs have arrays of the same shape, so
    ``arch`` has to name the family. With NMS in the graph the outputs are those of the family ``rtdetr``.

    Source: ``ppdet.modeling.heads.PPYOLOEHead.post_process``.
    """

    name = "ppyoloe"
    archs: tuple[str, ...] = ("ppyoloe", "ppyoloe+", "ppyolo", "yolo")
    outputs = "boxes [N, A, 4] (x1, y1, x2, y2) and scores [N, C, A] before NMS, or both as [N, A, 4 + C]"

    def fits(self, shapes: Shapes) -> bool:
        if len(shapes) == 1:
            (rows,) = shapes.values()
            if len(rows) != 3 or rows[2] <= 4:
                return False
            # [N, 4 + C, A] is a YOLO's array. Arrays after NMS have 100 to 300 rows of six numbers; the smallest inputs
            # have no more boxes, but 21 for each 32 x 32 pixels.
            after_nms = rows[2] == 6 and 0 < rows[1] <= _MOST_AFTER_NMS and rows[1] % _BOXES_OF_32_PIXELS
            return not after_nms and (rows[1] == -1 or rows[1] > rows[2])
        if len(shapes) != 2:
            return False
        boxes, scores = shapes.values()
        return len(boxes) == len(scores) == 3 and boxes[2] == 4 and boxes[1] == scores[2] and boxes[1] not in (-1, 4)

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        boxes, scores = _read(outputs)
        return weighted(scores, boxes / max(geometry.input_size))

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs:
        if len(shapes) == 1:
            (both,) = shapes
            return RawOutputs(Part(both, 2, 4), Part(both, 2, 0, 4), corners=True)
        boxes, scores = shapes
        return RawOutputs(Part(scores, 1), Part(boxes, 2), corners=True)

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        boxes, scores = _read(outputs)
        images = []
        for image in range(len(boxes)):
            rows = multiclass_nms(boxes[image], scores[image], post)
            if len(outputs) == 1:
                rows[:, 2:] = geometry.to_original(rows[:, 2:], image, post.clip)
            elif post.clip:
                rows[:, 2:] = geometry.clipped(rows[:, 2:], image)
            images.append(rows)
        return joined(images)


def _read(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes [N, A, 4] and scores [N, A, C], float32."""
    arrays = [np.asarray(array, np.float32) for array in outputs.values()]
    if len(arrays) == 1:
        return arrays[0][..., :4], arrays[0][..., 4:]
    return arrays[0], np.swapaxes(arrays[1], 1, 2)


FAMILY = PPYoloe()
