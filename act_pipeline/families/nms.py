"""Non-maximum suppression with the semantics of Paddle's ``multiclass_nms3``, and top-k selection."""

from __future__ import annotations

import numpy as np

from act_pipeline.families.interface import PostProcess


def multiclass_nms(boxes: np.ndarray, scores: np.ndarray, post: PostProcess) -> np.ndarray:
    """Suppress overlapping boxes class by class; a box may be returned for several classes.

    Source: Paddle's operator ``multiclass_nms3`` with ``nms_eta`` 1 or more. The candidates of all classes are taken in
    descending order of their scores, so that ``keep_top_k`` ends the work: a model with hundreds of classes, or one
    that is not trained, has ten thousands of candidates.

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
    order = np.lexsort((places, -values, classes))  # class by class, the best first
    order = order[classes[order] != post.background_label]
    if post.nms_top_k > -1:
        rank = np.arange(len(order)) - np.searchsorted(classes[order], classes[order])
        order = order[rank < post.nms_top_k]
    places, classes, values = places[order], classes[order], values[order]
    ends = np.searchsorted(classes, classes, "right")
    candidates = boxes[places]
    most = len(order) if post.keep_top_k == -1 else post.keep_top_k
    alive = np.ones(len(order), bool)
    kept: list[int] = []
    for best in np.lexsort((places, classes, -values)).tolist():
        if len(kept) == most:
            break
        if alive[best]:
            kept.append(best)
            others = slice(best + 1, ends[best])
            alive[others] &= ~_overlap(candidates[best], candidates[others], post.nms_threshold, post.normalized)
    return np.column_stack([classes[kept], values[kept], candidates[kept]]).astype(np.float32).reshape(-1, 6)


def _overlap(box: np.ndarray, others: np.ndarray, threshold: float, normalized: bool) -> np.ndarray:
    """Return whether the IoU of a box [4] with each of others [A, 4] is above the threshold, bool [A]."""
    extra = 0.0 if normalized else 1.0
    one, many = box.astype(np.float32), others.astype(np.float32)
    sizes = np.maximum(np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2]) + extra, 0)
    overlap = sizes[:, 0] * sizes[:, 1]
    areas = np.maximum(many[:, 2:] - many[:, :2] + extra, 0).prod(axis=1)
    above: np.ndarray = overlap > threshold * (np.maximum(one[2:] - one[:2] + extra, 0).prod() + areas - overlap)
    return above


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
