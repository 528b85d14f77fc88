"""Padding of the network's input, as a reader's transforms add it."""

from __future__ import annotations

from typing import Any

import numpy as np

# Transforms of ppdet that pad.
PADDING = ("Pad", "LetterBoxResize")


def padding_above_and_left(name: str, transform: Any, image: np.ndarray, im_shape: np.ndarray) -> np.ndarray:
    """Return the rows and columns that a transform has added above and to the left of the image.

    Source: ``Pad`` and ``LetterBoxResize`` of ``ppdet.data.transform``.

    Args:
        name: name of the transform.
        transform: the transform.
        image: its result, [H, W, 3].
        im_shape: height and width of the image without padding, in pixels.

    Returns:
        float32 [2], y then x; zeros for a transform that pads on no side, or only at the right and the bottom.
    """
    added = np.array(np.shape(image)[:2], np.float64) - np.rint(np.asarray(im_shape, np.float64))
    if name == "LetterBoxResize":
        return np.rint(added / 2 - 0.1).astype(np.float32)
    if name == "Pad":
        mode = transform.pad_mode
        if mode == -1:
            return np.array(transform.offsets[::-1], np.float32)
        if mode in (1, 2):
            return (added // 2 if mode == 1 else added).astype(np.float32)
    return np.zeros(2, np.float32)
