"""When a training is evaluated, and when it is stopped early.

The measure is the agreement of the INT8 model's detections with the float model's on held-out training images; the
evaluation images are not used. The first evaluation is before the first step, with the initial scales. Another one is
after ten iterations, so that a learning rate that ruins the model is detected early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from act_pipeline.execution.finite_checks import LOWER_RATE

EARLY = 10
# Number of consecutive decreases of the agreement that stops the training.
_FALLS = 3
# The model counts as worse than at the start if 1 - agreement grows by more than this factor and this difference.
_WORSE, _MARGIN = 1.5, 0.02


def is_due(iteration: int, every: int, total: int) -> bool:
    """Return whether a training is evaluated after an iteration.

    Args:
        iteration: the iteration; 0: before the first.
        every: ``TrainConfig.eval_iter``.
        total: the last iteration.
    """
    return iteration in (0, EARLY, total) or iteration % every == 0


def why_stop(evaluations: Sequence[tuple[int, float]], patience: Optional[int]) -> str:
    """Return why a training has to stop after its latest evaluation.

    Args:
        evaluations: ``(iteration, agreement)`` of each evaluation, the first before any step; the agreement is in
            [0, 1].
        patience: ``TrainConfig.patience``.

    Returns:
        The reason in one line; empty: the training continues.
    """
    values = [agreement for _, agreement in evaluations]
    if len(values) < 2:
        return ""
    start, (iteration, last) = values[0], evaluations[-1]
    if 1 - last > max(_WORSE * (1 - start), 1 - start + _MARGIN):
        return (
            f"it makes the model worse: the agreement with the float model was {start:.4f} before it, and is "
            f"{last:.4f} after {iteration} iterations; {LOWER_RATE}"
        )
    falling = values[-_FALLS - 1 :]
    if len(falling) > _FALLS and all(later < earlier for earlier, later in zip(falling, falling[1:])):
        return f"the agreement with the float model fell in {_FALLS} evaluations in a row; {LOWER_RATE}"
    best = max(range(len(values)), key=values.__getitem__)
    if patience is not None and len(values) - 1 - best >= patience:
        return f"no evaluation since iteration {evaluations[best][0]} was better (TrainConfig.patience: {patience})"
    return ""
