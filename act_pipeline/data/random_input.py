"""Random input for timings: speed does not depend on the content of the images."""

from __future__ import annotations

import numpy as np

from act_pipeline.core.artifacts import Artifact
from act_pipeline.data.model_fit import prompt_inputs
from act_pipeline.data.transforms import repeated


def random_batch(model: Artifact, size: tuple[int, int], images: int) -> dict[str, np.ndarray]:
    """Return a batch of random images with the other inputs of a model, the same at every call.

    Args:
        model: the model; its prompt, if it has one, gives further inputs.
        size: height and width of the input in pixels.
        images: number of images N.

    Returns:
        float32 ``image`` [N, 3, H, W] in [0, 1), ``im_shape`` and ``scale_factor`` [N, 2], and the prompt's inputs.
    """
    return {
        "image": np.random.default_rng(0).random((images, 3, *size), np.float32),
        "im_shape": np.tile(np.array(size, np.float32), (images, 1)),
        "scale_factor": np.ones((images, 2), np.float32),
        **repeated(prompt_inputs(model), images),
    }
