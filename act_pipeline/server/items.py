"""One image of a request, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import numpy as np


@dataclass(frozen=True)
class Picture:
    """An encoded picture.

    Attributes:
        data: a JPEG or PNG file.
    """

    data: bytes


@dataclass(frozen=True)
class Prepared:
    """An image as the network takes it.

    Attributes:
        image: float32 [3, H, W], normalized as the model's preprocessing does.
        im_shape: height and width of the resized image, float32 [2]; None: H and W.
        scale_factor: resized / original size, y then x, float32 [2]; None: 1.
    """

    image: np.ndarray
    im_shape: Optional[np.ndarray] = None
    scale_factor: Optional[np.ndarray] = None


Item = Union[Picture, Prepared]


@dataclass(frozen=True)
class Found:
    """The detections on one image.

    Attributes:
        bbox: float32 [K, 6]: class index, score, x1, y1, x2, y2 in pixels of the original image.
        milliseconds: how long the engine took for the batch that the image was in, divided by its images.
    """

    bbox: np.ndarray
    milliseconds: float


@dataclass(frozen=True)
class Refused:
    """An image that is not answered.

    Attributes:
        reason: one line.
        by_client: whether the request is wrong; otherwise the server failed.
    """

    reason: str
    by_client: bool = True


@dataclass(frozen=True)
class Shares:
    """The activations of the INT8 model on one image.

    Attributes:
        shares: share of each tensor's elements that are beyond its calibrated range, float32 [T].
    """

    shares: np.ndarray


Outcome = Union[Found, Refused]
