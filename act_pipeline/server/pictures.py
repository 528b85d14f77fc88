"""JPEG and PNG from strangers: checked before they are decoded, then prepared as the model's reader does."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from act_pipeline.bundle.device import preprocess as device
from act_pipeline.server.items import Prepared
from act_pipeline.server.settings import Limits

FORMATS = ("JPEG", "PNG")


class BadPicture(Exception):
    """A picture that is refused; the message is one line."""


def check_picture(data: bytes, limits: Limits) -> None:
    """Check kind and size by the header alone.

    Args:
        data: the file.
        limits: the most bytes and pixels.

    Raises:
        BadPicture: it is no JPEG or PNG, or larger.
    """
    from PIL import Image

    if len(data) > limits.picture_bytes:
        raise BadPicture(f"the picture has {len(data)} bytes, expected at most {limits.picture_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"the picture has more than {limits.picture_pixels} pixels, the most that is read") from None
    except Exception:  # Pillow raises exceptions of many types for damaged headers
        raise BadPicture(
            f"{len(data)} bytes are no {' or '.join(FORMATS)}, expected the content of such a file"
        ) from None
    if width * height > limits.picture_pixels:
        raise BadPicture(f"the picture has {width} x {height} pixels, expected at most {limits.picture_pixels}")


def prepare_picture(data: bytes, steps: Sequence[dict[str, Any]], limits: Limits) -> tuple[Prepared, np.ndarray]:
    """Decode a picture and prepare it for the network.

    Args:
        data: a JPEG or PNG file.
        steps: the preprocessing, of :func:`act_pipeline.bundle.description.device_steps`.
        limits: what is refused.

    Returns:
        the image, and ``pad_offset`` float32 [2].

    Raises:
        BadPicture: it is refused, or cannot be decoded.
    """
    import cv2

    check_picture(data, limits)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise ValueError("no pixels")
        sample = device.preprocess(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), steps)
    except device.Refused as error:
        raise BadPicture(f"the picture cannot be prepared: {error}") from None
    except (cv2.error, ValueError, MemoryError):
        raise BadPicture("the picture is damaged: it cannot be decoded") from None
    return Prepared(sample["image"], sample["im_shape"], sample["scale_factor"]), sample["pad_offset"]
