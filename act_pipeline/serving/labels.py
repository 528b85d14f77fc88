"""mAP of a version on requests whose labels were posted back."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np


@dataclass
class Labels:
    """The last answers of a version by request id, and the labels of some of them.

    Attributes:
        kept: the most answers that wait for labels, and the most labelled images.
        waiting: request id -> detections [K, 6].
        labelled: request id -> detections [K, 6] and objects [G, 5].
        posted: number of images that labels have come for.
        map: COCO's mAP at IoU 0.50:0.95 of the labelled images when ``scored`` of them had come, by
            :func:`mean_average_precision`; None without an object.
    """

    kept: int
    waiting: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    labelled: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=OrderedDict)
    posted: int = 0
    map: Optional[float] = None
    scored: int = 0

    def answer(self, request_id: str, detections: np.ndarray) -> None:
        """Keep an answer until its labels come, or until ``kept`` others have come."""
        self.waiting.pop(request_id, None)
        self.waiting[request_id] = detections
        while len(self.waiting) > self.kept:
            self.waiting.popitem(last=False)

    def post(self, request_id: str, objects: np.ndarray) -> bool:
        """Add the labels of a request; False if its answer is not kept any more.

        Args:
            request_id: the request's id.
            objects: float64 [G, 5]: class index, x1, y1, x2, y2 in pixels of the original image; empty: no object.
        """
        detections = self.waiting.pop(request_id, None)
        if detections is None:
            return False
        self.labelled[request_id] = detections, objects
        self.posted += 1
        while len(self.labelled) > self.kept:
            self.labelled.popitem(last=False)
        return True


def mean_average_precision(images: list[tuple[np.ndarray, np.ndarray]]) -> Optional[float]:
    """Return COCO's mAP at IoU 0.50:0.95; None if there is no object.

    Args:
        images: detections [K, 6] (class, score, x1, y1, x2, y2) and objects [G, 5] (class, x1, y1, x2, y2) of each.
    """
    import contextlib
    import io

    from pycocotools.coco import COCO

    from act_pipeline.evaluation.coco import score_detections
    from act_pipeline.evaluation.detection_rows import rows_of_outputs

    objects = [
        {
            "image_id": place, "category_id": int(index), "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
        }
        for place, (_, found) in enumerate(images)
        for index, x1, y1, x2, y2 in found.tolist()
    ]  # fmt: skip
    if not objects:
        return None
    classes = sorted({int(entry["category_id"]) for entry in objects})
    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": place} for place in range(len(images))],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(objects, start=1)],
        "categories": [{"id": index} for index in classes],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    rows = [rows_of_outputs(found, np.full(len(found), place)) for place, (found, _) in enumerate(images)]
    detections = np.concatenate(rows)
    detections = detections[np.isin(detections[:, 6], classes)]
    return score_detections(coco, detections, list(range(len(images)))).stats["ap"]
