"""Detectors that end with a fixed number of rows an image: YOLOv10, and Ultralytics' exports with NMS."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from act_pipeline.families.interface import Detections, Geometry, PostProcess, Shapes, joined

_MOST_ROWS = 1000


class EndToEnd:
    """One array [N, K, 6] of x1, y1, x2, y2 (pixels of the input), score and class."""

    name = "end2end"
    archs: tuple[str, ...] = ("yolov10",)
    outputs = "one array [N, K, 6] (x1, y1, x2, y2, score, class) after NMS"

    def fits(self, shapes: Shapes) -> bool:
        if len(shapes) != 1:
            return False
        (shape,) = shapes.values()
        return len(shape) == 3 and shape[2] == 6 and 0 < shape[1] <= _MOST_ROWS

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> None:
        return None

    def raw(self, shapes: Shapes, num_classes: int | None) -> None:
        return None

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        (array,) = (np.asarray(array, np.float32) for array in outputs.values())
        images = []
        for image, rows in enumerate(array):
            rows = rows[rows[:, 4] > post.score_threshold]
            rows = rows[np.argsort(-rows[:, 4], kind="stable")]
            boxes = geometry.to_original(rows[:, :4], image, post.clip)
            images.append(np.column_stack([np.rint(rows[:, 5]), rows[:, 4], boxes]))
        return joined(images)


FAMILY = EndToEnd()
