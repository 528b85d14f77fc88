"""The boxes of a data set as prompts of a model that segments them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.data.annotations import Annotations

if TYPE_CHECKING:  # it imports this module
    from act_pipeline.data.dataset import ImageRecord


def with_prompts(
    records: Sequence[ImageRecord], annotations: Annotations, class_ids: Sequence[int], *, one_each: bool
) -> list[ImageRecord]:
    """Return the images of a split with their boxes, in the order of the annotation file; crowds are no prompts.

    Args:
        records: the images.
        annotations: the annotation file.
        class_ids: the category id of every class index.
        one_each: whether each box makes a record of its own; images without a box are left out then.

    Raises:
        UserError: there are no boxes, or one lies outside its image.
    """
    index_of = {category: index for index, category in enumerate(class_ids)}
    images = {image["id"]: image for image in annotations.images}
    found: dict[int, list[tuple[float, ...]]] = {}
    for box in annotations.boxes or ():
        if box["iscrowd"] or box["category_id"] not in index_of:
            continue
        corners = _corners(box, images[box["image_id"]], annotations)
        found.setdefault(box["image_id"], []).append((index_of[box["category_id"]], *corners))
    prompted = [replace(record, prompts=tuple(found.get(record.image_id, ()))) for record in records]
    if not any(record.prompts for record in prompted):
        raise UserError(
            f"{annotations.path} has no boxes for its images, expected some: the model segments what is in a box"
        )
    if not one_each:
        return prompted
    return [replace(record, prompts=(prompt,)) for record in prompted for prompt in record.prompts]


def on_input(prompts: Sequence[Sequence[float]], sample: dict[str, Any], rows: int) -> np.ndarray:
    """Return the prompts of an image in pixels of the network's input.

    Args:
        prompts: class index, x1, y1, x2, y2 in pixels of the original image, one row each.
        sample: has ``scale_factor`` and ``pad_offset``.
        rows: number of rows to return, at least that of the prompts.

    Returns:
        float32 [rows, 5]; further rows are NaN.
    """
    scaled = np.full((rows, 5), np.nan, np.float32)
    if prompts:
        (scale_y, scale_x), (top, left) = sample["scale_factor"], sample["pad_offset"]
        scaled[: len(prompts)] = np.asarray(prompts, np.float32)
        scaled[:, 1:] = scaled[:, 1:] * [scale_x, scale_y, scale_x, scale_y] + [left, top, left, top]
    return scaled


def _corners(box: dict[str, Any], image: dict[str, Any], annotations: Annotations) -> tuple[float, ...]:
    """Return x1, y1, x2, y2 of a box within its image, whose size the file may leave out."""
    x, y, width, height = box["bbox"]
    right, bottom = image.get("width") or np.inf, image.get("height") or np.inf
    corners = max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise UserError(
            f"{annotations.path}: the box {box['bbox']} of image {box['image_id']} ({image['file_name']}) is outside "
            f"its {image.get('width')} x {image.get('height')} pixels, expected x, y, width, height inside; correct it"
        )
    return tuple(float(value) for value in corners)
