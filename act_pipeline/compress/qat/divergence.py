"""The course of a training: when it is evaluated, and when it is not worth going on.

What is looked at is the agreement of the INT8 model's detections with the float model's on training images that are
held
out: no verdict on the images that judge. The first evaluation is before any step, of the scales alone, and one more
comes early, so that a learning rate that ruins the model is said after ten iterations and not after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from act_pipeline.execution.finite_checks import LOWER_RATE

EARLY = 10
# Evaluations in a row, each lower than the one before.
_FALLS = 3
# A model is worse than it was if its detections are so many times as far from the float model's, and this much further.
_WORSE, _MARGIN = 1.5, 0.02


def is_due(iteration: int, every: int, total: int) -> bool:
    """Return whether a training is evaluated after an iteration.

    Args:
        iteration: 0: before the first.
        every: ``TrainConfig.eval_iter``.
        total: the last one.
    """
    return iteration in (0, EARLY, total) or iteration % every == 0


def why_stop(evaluations: Sequence[tuple[int, float]], patience: Optional[int]) -> str:
    """Return why a training ends after its last evaluation, in one line; empty: it goes on.

    Args:
        evaluations: ``(iteration, agreement)`` of each, the first before any step; agreement is in 0..1.
        patience: ``TrainConfig.patience``.
    """
    values = [agreement for _, agreement in evaluations]
    if len(values) < 2:
        return ""
    start, (iteration, last) = values[0], evaluations[-1]
    if 1 - last > max(_WORSE * (1 - start), 1 - start + _MARGIN):
        return (
            f"it makes the model worse: the agreement with the float model was {start:.4f} before it, and is "
            f"{last:.4f} "
            f"after {iteration} iterations; {LOWER_RATE}"
        )
    falling = values[-_FALLS - 1 :]
    if len(falling) > _FALLS and all(later < earlier for earlier, later in zip(falling, falling[1:])):
        return f"the agreement with the float model fell in {_FALLS} evaluations in a row; {LOWER_RATE}"
    best = max(range(len(values)), key=values.__getitem__)
    if patience is not None and len(values) - 1 - best >= patience:
        return f"no evaluation since iteration {evaluations[best][0]} was better (TrainConfig.patience: {patience})"
    return ""
