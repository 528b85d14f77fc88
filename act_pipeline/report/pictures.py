"""The images on which two models differ most: photographs as JPEG, boxes as data that the page draws."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.report.differences import Pair
from act_pipeline.report.errors import FOREGROUND_IOU, box_iou

# Keeps a page with six photographs, each shown twice, below 2 MB.
LONGEST_SIDE, JPEG_QUALITY = 640, 82


def describe(
    image: Mapping[str, Any],
    found: Sequence[Pair],
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    difference: float,
    threshold: float,
) -> dict[str, Any]:
    """Return the data that a page shows of one image.

    Args:
        image: COCO's entry; ``width`` and ``height`` may be missing.
        found: the pairs of the image.
        objects: COCO's annotations of the image.
        names: category id -> class name.
        difference: difference of the image, see :func:`most_different`.
        threshold: minimum score of a detection.

    Returns:
        ``image_id``, ``file_name``, ``difference``, the counts ``both``, ``lost``, ``new``, and ``boxes``. Each box has
        ``number`` (the same in both pictures), ``status``, ``class``, ``iou``, ``fp32`` and ``int8`` (None, or ``box``
        [x, y, width, height] in pixels of the image, ``score``, ``shown``), and ``right``: whether it finds an object
        of its class.
    """
    boxes: list[dict[str, Any]] = []
    for pair in found:
        surest = pair.shown(threshold)
        if surest is None:
            continue
        boxes.append(
            {
                "number": len(boxes) + 1,
                "status": pair.status(threshold),
                "class": names.get(int(surest[6]), str(int(surest[6]))),
                "iou": None if pair.iou is None else round(pair.iou, 4),
                "fp32": _side(pair.first, threshold),
                "int8": _side(pair.second, threshold),
                "right": _is_right(surest, objects),
            }
        )
    return {
        "image_id": image["id"],
        "file_name": image["file_name"],
        "difference": round(difference, 4),
        **{status: sum(box["status"] == status for box in boxes) for status in ("both", "lost", "new")},
        "boxes": boxes,
    }


def _side(row: np.ndarray | None, threshold: float) -> dict[str, Any] | None:
    if row is None:
        return None
    box = [round(float(value), 1) for value in row[1:5]]
    return {"box": box, "score": round(float(row[5]), 4), "shown": bool(row[5] >= threshold)}


def _is_right(row: np.ndarray, objects: Sequence[Mapping[str, Any]]) -> bool:
    own = np.array([item["bbox"] for item in objects if item["category_id"] == int(row[6])], np.float64).reshape(-1, 4)
    return bool((box_iou(row[None, 1:5], own) >= FOREGROUND_IOU).any())


def photograph(path: Path) -> tuple[str, int, int] | None:
    """Return an image as a JPEG data URI of at most 640 pixels per side, with its original width and height.

    The result is None if the file is missing or not an image, so that the report is written without it.
    """
    import cv2

    from act_pipeline.inference.visualize import read_image

    try:
        pixels = read_image(path)
    except UserError:
        return None
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)
    if not ok:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii"), width, height
