"""Detections as engines give them, and as rows of ``Evaluation.detections``."""

from __future__ import annotations

import numpy as np


def rows_of_outputs(bbox: np.ndarray, images: np.ndarray, categories: np.ndarray | None = None) -> np.ndarray:
    """Return rows of ``Evaluation.detections``, [K, 7]: image, x, y, width, height, score, category.

    Args:
        bbox: [K, 6]: class, score, x1, y1, x2, y2.
        images: [K], the images that the rows belong to.
        categories: [K]; None: the classes stand in their place.
    """
    last = bbox[:, 0] if categories is None else categories
    return np.column_stack([images, bbox[:, 2:4], bbox[:, 4:6] - bbox[:, 2:4], bbox[:, 1], last])


def outputs_of_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows of ``Evaluation.detections`` [K, 7] as [K, 6]: category, score, x1, y1, x2, y2."""
    return np.column_stack([rows[:, 6], rows[:, 5], rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]])
