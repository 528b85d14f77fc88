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


class PPYoloe:
    """Boxes [N, A, 4] (x1, y1, x2, y2 in pixels of the original image) and scores [N, C, A].

    Source: ``ppdet.modeling.heads.PPYOLOEHead.post_process``. With NMS in the graph the outputs are those of the family
    ``rtdetr``.
    """

    name = "ppyoloe"
    archs: tuple[str, ...] = ("ppyoloe", "ppyoloe+", "ppyolo", "yolo")
    outputs = "boxes [N, A, 4] (x1, y1, x2, y2) and scores [N, C, A] before NMS"

    def fits(self, shapes: Shapes) -> bool:
        if len(shapes) != 2:
            return False
        boxes, scores = shapes.values()
        return len(boxes) == len(scores) == 3 and boxes[2] == 4 and boxes[1] == scores[2] and boxes[1] not in (-1, 4)

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        boxes, scores = outputs.values()
        return weighted(np.swapaxes(scores, 1, 2), boxes / max(geometry.input_size))

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs:
        boxes, scores = shapes
        return RawOutputs(Part(scores, 1), Part(boxes, 2), corners=True)

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        boxes, scores = (np.asarray(array, np.float32) for array in outputs.values())
        limit = geometry.im_shape[:, ::-1] / geometry.scale_factor[:, ::-1]
        images = []
        for image in range(len(boxes)):
            rows = multiclass_nms(boxes[image], scores[image].T, post)
            if post.clip:
                rows[:, 2:] = np.clip(rows[:, 2:], 0, np.tile(limit[image], 2))
            images.append(rows)
        return joined(images)


FAMILY = PPYoloe()
