"""ONNX files that end with their own NMS, whose boxes still have to be moved to, or clipped to, the original image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from act_pipeline.families.interface import Detections, Geometry, PostProcess, Shapes, joined


class NmsInFile:
    """``bbox [K, 6]`` and ``bbox_num [N]``, or the four outputs of TensorRT's ``EfficientNMS_TRT``.

    The four are the number of detections [N, 1], boxes [N, K, 4] (x1, y1, x2, y2), scores [N, K] and classes [N, K], as
    deploy/export_onnx.py and the exporters of YOLOv7 and YOLOv8 write them.

    Attributes:
        on_input: whether boxes are in pixels of the network's input; otherwise of the original image.
    """

    archs: tuple[str, ...] = ()

    def __init__(self, on_input: bool) -> None:
        self.on_input = on_input
        self.name = "nms_on_input" if on_input else "nms_on_original"
        self.outputs = (
            "num_dets [N, 1], det_boxes [N, K, 4], det_scores [N, K] and det_classes [N, K] after NMS, in pixels of "
            + ("the input" if on_input else "the original image")
        )

    def fits(self, shapes: Shapes) -> bool:
        sizes = list(shapes.values())
        if len(sizes) == 2:
            return len(sizes[0]) in (0, 2) and sizes[0][1:] in ((), (6,), (-1,)) and len(sizes[1]) in (0, 1)
        return len(sizes) == 4 and [len(size) for size in sizes] == [2, 3, 2, 2] and sizes[1][2] == 4

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> None:
        return None

    def raw(self, shapes: Shapes, num_classes: int | None) -> None:
        return None

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        arrays = [np.asarray(array) for array in outputs.values()]
        images = _rows(*arrays) if len(arrays) == 2 else _padded_rows(*arrays)
        for image, rows in enumerate(images):
            if self.on_input:
                rows[:, 2:] = geometry.to_original(rows[:, 2:], image, post.clip)
            elif post.clip:
                rows[:, 2:] = geometry.clipped(rows[:, 2:], image)
        return joined(images)


def _rows(bbox: np.ndarray, bbox_num: np.ndarray) -> list[np.ndarray]:
    """Return the rows [K, 6] of each image."""
    rows = np.asarray(bbox, np.float32).reshape(-1, 6).copy()
    return np.split(rows, np.cumsum(bbox_num.reshape(-1))[:-1].astype(np.int64))


def _padded_rows(count: np.ndarray, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
    """Return the rows [K, 6] of each image, without the padding after its last detection.

    Rows with a negative score are none: with a threshold of scores below 0.007, TensorRT's plugin counts them too.
    """
    images = []
    for image, rows in enumerate(count.reshape(-1).astype(np.int64)):
        found = np.column_stack([classes[image, :rows], scores[image, :rows], boxes[image, :rows]]).astype(np.float32)
        images.append(found[found[:, 1] >= 0])
    return images


FAMILIES = (NmsInFile(on_input=True), NmsInFile(on_input=False))
