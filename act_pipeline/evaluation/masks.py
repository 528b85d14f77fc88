"""Masks of detections: their IoU with those of the data set, and with those of another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.evaluation.agreement import ImageSums
from act_pipeline.evaluation.coco import GroundTruth


def require_masks(truth: GroundTruth, image_ids: Sequence[int]) -> None:
    """Check that the objects of images have masks, so that those of a model can be scored.

    Raises:
        UserError: one has no ``segmentation``.
    """
    objects = truth.coco.loadAnns(truth.coco.getAnnIds(imgIds=list(image_ids)))
    without = [entry for entry in objects if not entry.get("segmentation")]
    if without:
        raise UserError(
            f"{truth.path}: {len(without)} of {len(objects)} annotations have no segmentation (the first is of image "
            f"{without[0]['image_id']}), expected polygons or RLE; add them, or compare without labels, "
            "Global.Evaluation: agreement"
        )


def mask_sums(truth: GroundTruth, detections: np.ndarray, masks: Sequence[Any], image_ids: Sequence[int]) -> ImageSums:
    """Return the IoU of each object's mask with the mask that a model makes of its box, summed by image.

    Args:
        truth: ground truth of these images. Objects that are no crowd were the prompts, in the order of the file.
        detections: float64 [M, 7], see ``Evaluation.detections``, in the order of the prompts.
        masks: mask of each detection, COCO's run lengths.
        image_ids: COCO ids that the first column of ``detections`` indexes.

    Returns:
        ``agreed``: sum of the IoUs, ``objects``: number of objects with a mask, by image. The mIoU is the quotient of
        their sums.
    """
    from pycocotools import mask as coco_mask

    known = set(truth.category_ids)
    order = np.argsort(detections[:, 0], kind="stable")
    starts = np.searchsorted(detections[order, 0], np.arange(len(image_ids) + 1))
    sums, counts = np.zeros(len(image_ids)), np.zeros(len(image_ids), np.int64)
    for place, image_id in enumerate(image_ids):
        objects = [
            entry
            for entry in truth.coco.imgToAnns.get(image_id, ())
            if not entry["iscrowd"] and entry["category_id"] in known
        ]
        rows = order[starts[place] : starts[place + 1]]
        for entry, row in zip(objects, rows.tolist()):
            mask = truth.coco.annToRLE(entry)
            sums[place] += float(coco_mask.iou([masks[row]], [mask], [0])[0, 0])
            counts[place] += 1
    return ImageSums(sums, counts)


def mean_iou(sums: ImageSums) -> float:
    """Return the mean IoU of all objects; -1 if there are none."""
    count = int(sums.objects.sum())
    return float(sums.agreed.sum()) / count if count else -1.0
