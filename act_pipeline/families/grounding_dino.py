"""GroundingDINO: a DETR whose logits are one a token of a prompt, not one a class."""

from __future__ import annotations

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.families.detr_raw import RawDetr, sigmoids
from act_pipeline.families.interface import PostProcess


class GroundingDino(RawDetr):
    """Logits [N, Q, T], one a token, and boxes [N, Q, 4] relative to the input (cx, cy, w, h).

    The score of a class is the mean of the sigmoids of its tokens (``PostProcess.class_tokens``).
    """

    name = "grounding_dino"
    archs: tuple[str, ...] = ("grounding-dino", "groundingdino", "mm-grounding-dino")
    outputs = "logits [N, Q, T], one a token, and boxes [N, Q, 4] (centre x, centre y, width, height, 0 to 1)"

    def _class_scores(self, logits: np.ndarray, post: PostProcess) -> np.ndarray:
        return sigmoids(logits) @ token_means(post.class_tokens, logits.shape[2])


def token_means(class_tokens: tuple[tuple[int, ...], ...], tokens: int) -> np.ndarray:
    """Return the matrix by which scores of tokens become means over the tokens of each class.

    Args:
        class_tokens: positions of the tokens of each class.
        tokens: number of tokens T.

    Returns:
        float32 [T, C].

    Raises:
        UserError: there are no classes, or one has a token beyond T.
    """
    if not class_tokens:
        raise UserError(
            "the model gives one score a token, but its infer_cfg.yml has no section prompt that says which tokens "
            "make a class; import the model with a prompt"
        )
    counts = np.array([len(positions) for positions in class_tokens])
    places = np.concatenate([np.asarray(positions, np.int64) for positions in class_tokens])
    if places.max() >= tokens:
        raise UserError(f"a class of the prompt has token {places.max()}, but the model scores 0 to {tokens - 1} only")
    matrix = np.zeros((tokens, len(class_tokens)), np.float32)
    np.add.at(matrix, (places, np.repeat(np.arange(len(counts)), counts)), np.repeat(1 / counts, counts))
    return matrix


FAMILY = GroundingDino()
