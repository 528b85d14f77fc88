"""DETRs that end with logits and boxes: RT-DETR, RT-DETRv2 and D-FINE of transformers, exports without post-process."""

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
from act_pipeline.families.nms import best_pairs, corners


class RawDetr:
    """Logits [N, Q, C], whose sigmoids are the scores, and boxes [N, Q, 4] relative to the input (cx, cy, w, h).

    The input is resized without keeping the ratio, or padded as the reader says; boxes are relative to the whole input.
    """

    name = "detr_raw"
    archs: tuple[str, ...] = ("rt_detr", "rt_detr_v2", "d_fine")
    outputs = "logits [N, Q, C] and boxes [N, Q, 4] (centre x, centre y, width, height, 0 to 1)"

    def fits(self, shapes: Shapes) -> bool:
        return _roles(shapes) is not None

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        logits, boxes = self._read(outputs)
        return weighted(sigmoids(logits), boxes)

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs | None:
        roles = _roles(shapes)
        if roles is None:
            return None
        logits, boxes = roles
        return RawOutputs(Part(logits, 2), Part(boxes, 2), logits=True, pixels=False)

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        logits, boxes = self._read(outputs)
        height, width = geometry.input_size
        pixels = corners(boxes) * np.array([width, height, width, height], np.float32)
        scores = self._class_scores(logits, post)
        return joined(
            [
                best_pairs(scores[image], geometry.to_original(pixels[image], image, post.clip), post)
                for image in range(len(logits))
            ]
        )

    def _class_scores(self, logits: np.ndarray, post: PostProcess) -> np.ndarray:
        """Return the scores [N, Q, C] of logits [N, Q, .]."""
        return sigmoids(logits)

    @staticmethod
    def _read(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and boxes, float32."""
        roles = _roles({name: array.shape for name, array in outputs.items()})
        assert roles is not None  # `fits` was true of the same outputs
        logits, boxes = (np.asarray(outputs[name], np.float32) for name in roles)
        return logits, boxes


def sigmoids(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoids of logits, 0 where a logit is -inf."""
    scores: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    scores[logits == -np.inf] = 0  # marks what is no class
    return scores


def _roles(shapes: Shapes) -> tuple[str, str] | None:
    """Return the names of logits and boxes; None: there is no such pair."""
    three = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    boxes = [name for name, shape in three.items() if shape[2] == 4]
    # With four classes both end in 4: then names decide, and otherwise the order.
    boxes.sort(key=lambda name: not name.endswith("boxes"))
    for box in boxes[:1] if len(boxes) < 2 or boxes[0].endswith("boxes") else boxes[-1:]:
        for name, shape in three.items():
            if name != box and shape[1] == three[box][1] and shape[1] != -1:
                return name, box
    return None


FAMILY = RawDetr()
