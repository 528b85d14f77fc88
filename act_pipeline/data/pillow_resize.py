"""Resizing as Pillow does, which averages over all pixels that a smaller one covers; OpenCV reads a few of them.

Processors of Hugging Face and torchvision resize in this way, so models of these are trained on such pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.core.paddledet import import_ppdet

# Name in a reader -> names of the same filter in Pillow and in OpenCV; the latter is for masks.
_FILTERS = {
    "pillow_nearest": ("NEAREST", "INTER_NEAREST"),
    "pillow_bilinear": ("BILINEAR", "INTER_LINEAR"),
    "pillow_bicubic": ("BICUBIC", "INTER_CUBIC"),
    "pillow_lanczos": ("LANCZOS", "INTER_LANCZOS4"),
}
PILLOW_FILTERS = tuple(_FILTERS)


def pillow_resize(interp: str, **arguments: Any) -> Any:
    """Return ppdet's transform ``Resize`` with a filter of Pillow.

    Args:
        interp: one of :data:`PILLOW_FILTERS`.
        **arguments: the other arguments of ``Resize``: ``target_size``, ``keep_ratio``.
    """
    import cv2
    from PIL import Image

    pillow, opencv = _FILTERS[interp]

    class Resize(import_ppdet("ppdet.data.transform").Resize):  # type: ignore[misc]
        def apply_image(self, image: np.ndarray, scale: Sequence[float]) -> np.ndarray:
            """Resize ``image``, uint8 [H, W, 3], by the factors (x, y)."""
            size = (round(image.shape[1] * scale[0]), round(image.shape[0] * scale[1]))
            resized = Image.fromarray(image).resize(size, getattr(Image.Resampling, pillow))
            return np.asarray(resized)

    return Resize(interp=getattr(cv2, opencv), **arguments)
