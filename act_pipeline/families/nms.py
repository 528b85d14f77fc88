"""Non-maximum suppression with the semantics of Paddle's ``multiclass_nms3``, and top-k selection."""

from __future__ import annotations

import numpy as np

from act_pipeline.families.interface import PostProcess


def multiclass_nms(boxes: np.ndarray, scores: np.ndarray, post: PostProcess) -> np.ndarray:
    """Suppress overlapping boxes class by class; a box may be returned for several classes.

    Source: Paddle's operator ``multiclass_nms3`` with ``nms_eta`` 1 or more.

    Args:
        boxes: [A, 4], x1, y1, x2, y2.
        scores: [A, C].
        post: thresholds and counts.

    Returns:
        float32 [K, 6]: class, score, x1, y1, x2, y2, in descending order of the scores.
    """
    # One comparison of all scores: most of the boxes have no score above the threshold.
    places, classes = np.nonzero(scores > post.score_threshold)
    values = scores[places, classes]
    order = np.argsort(-values, kind="stable")
    kept = []
    for index in np.unique(classes):
        if index == post.background_label:
            continue
        candidates = order[classes[order] == index]
        if post.nms_top_k > -1:
            candidates = candidates[: post.nms_top_k]
        chosen = suppress(boxes[places[candidates]], post.nms_threshold, post.normalized)
        kept.append(candidates[chosen])
    if not kept:
        return np.zeros((0, 6), np.float32)
    rows = np.concatenate(kept)
    rows = rows[np.argsort(-values[rows], kind="stable")]
    if post.keep_top_k > -1:
        rows = rows[: post.keep_top_k]
    return np.column_stack([classes[rows], values[rows], boxes[places[rows]]]).astype(np.float32)


def suppress(boxes: np.ndarray, threshold: float, normalized: bool = True) -> np.ndarray:
    """Return the indices of the boxes that greedy NMS keeps.

    Args:
        boxes: [A, 4], x1, y1, x2, y2, in descending order of their scores.
        threshold: a box whose IoU with a kept box is above this is dropped.
        normalized: see :class:`act_pipeline.families.interface.PostProcess`.

    Returns:
        int64 [K], ascending.
    """
    extra = 0.0 if normalized else 1.0
    x1, y1, x2, y2 = boxes.astype(np.float32).T
    areas = np.maximum(x2 - x1 + extra, 0) * np.maximum(y2 - y1 + extra, 0)
    left = np.arange(len(boxes))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left]) + extra
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left]) + extra
        overlap = np.maximum(width, 0) * np.maximum(height, 0)
        union = areas[best] + areas[left] - overlap
        left = left[overlap <= threshold * union]
    return np.array(kept, np.int64)


def best_pairs(scores: np.ndarray, boxes: np.ndarray, post: PostProcess) -> np.ndarray:
    """Return the pairs of a query and a class with the highest scores, as a DETR's post-process does, without NMS.

    Args:
        scores: [Q, C].
        boxes: [Q, 4], x1, y1, x2, y2.
        post: ``score_threshold`` and ``keep_top_k``.

    Returns:
        float32 [K, 6]: class, score, x1, y1, x2, y2, in descending order of the scores.
    """
    flat = scores.reshape(-1)
    count = len(flat) if post.keep_top_k == -1 else min(post.keep_top_k, len(flat))
    best = np.argsort(-flat, kind="stable")[:count]
    best = best[flat[best] > post.score_threshold]
    queries, classes = np.divmod(best, scores.shape[1])
    return np.column_stack([classes, flat[best], boxes[queries]]).astype(np.float32)


def corners(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes [..., 4] from centre x, centre y, width, height to x1, y1, x2, y2."""
    centre, size = boxes[..., :2], boxes[..., 2:4]
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1)
