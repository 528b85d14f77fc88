"""From the images of a request to the inputs of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from act_pipeline.server.items import Item, Picture, Prepared
from act_pipeline.server.pictures import BadPicture, prepare_picture
from act_pipeline.server.settings import Limits

# An image as the network takes it, and where it lies in a padded input.
Sample = tuple[Prepared, np.ndarray]


class Network(Protocol):
    """What is known of a network: a :class:`act_pipeline.server.model.ServedModel`, or a probe of one."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""

    @property
    def steps(self) -> Sequence[dict[str, Any]]:
        """The preprocessing of pictures."""

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Inputs that are the same for every image, name -> [1, ...]."""


def prepared_item(network: Network, item: Item, limits: Limits) -> Sample:
    """Return an image as a network takes it.

    Raises:
        BadPicture: it is damaged, too large, or of another size than the input.
    """
    if isinstance(item, Picture):
        return prepare_picture(item.data, network.steps, limits)
    expected = (3, *network.input_size)
    if item.image.shape != expected:
        raise BadPicture(f"image is {list(item.image.shape)}, this version takes {list(expected)}")
    factors = () if item.scale_factor is None else (item.scale_factor,)
    if not all(np.isfinite(factor).all() and (factor > 0).all() for factor in factors):
        raise BadPicture("scale_factor is not positive, expected resized size / original size, y then x")
    return item, np.zeros(2, np.float32)


def batch_of(network: Network, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return the inputs of a network, name -> [N, ...]; also such that it may not have."""
    size, one = np.array(network.input_size, np.float32), np.ones(2, np.float32)
    images = [item for item, _ in samples]
    batch = {
        # One image is not copied, which for 640x640 is 5 MB.
        "image": images[0].image[np.newaxis] if len(images) == 1 else np.stack([item.image for item in images]),
        "im_shape": np.stack([size if item.im_shape is None else item.im_shape for item in images]),
        "scale_factor": np.stack([one if item.scale_factor is None else item.scale_factor for item in images]),
        "pad_offset": np.stack([offset for _, offset in samples]),
    }
    return {**batch, **{name: np.repeat(value, len(samples), 0) for name, value in network.constants.items()}}
