"""Detectors whose post-process is in the graph: RT-DETR of PaddleDetection, and others exported with their NMS."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from act_pipeline.families.interface import Detections, Geometry, PostProcess, Shapes


class PostProcessInGraph:
    """``bbox [K, 6]`` and ``bbox_num [N]`` come out of the graph, in pixels of the original image."""

    name = "rtdetr"
    archs: tuple[str, ...] = ("detr", "rt-detr")
    outputs = "bbox [K, 6] (class, score, x1, y1, x2, y2) and bbox_num [N]"

    def fits(self, shapes: Shapes) -> bool:
        first = next(iter(shapes.values()), ())
        return len(shapes) >= 2 and (not first or (len(first) == 2 and first[1] in (-1, 6)))

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> None:
        return None

    def raw(self, shapes: Shapes, num_classes: int | None) -> None:
        return None

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        bbox, bbox_num = (np.asarray(array) for array in list(outputs.values())[:2])
        # A runtime may give an empty array another shape.
        bbox = bbox if bbox.size else bbox.reshape(0, 6)
        return Detections(bbox.astype(np.float32, copy=False), bbox_num.astype(np.int32).reshape(-1))


FAMILY = PostProcessInGraph()
