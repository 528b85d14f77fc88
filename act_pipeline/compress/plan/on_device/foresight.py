"""Which measurements the planner is going to ask for, so that the device is visited seldom.

Every visit makes the measurements of one step. What the planner asks depends on what was measured, so it is run on
suppositions: nothing gains before it was measured alone, and all that gains alone gains together. The first step then
holds all groups alone, the second one what they are together. If they do not all gain in addition, there is a third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from act_pipeline.compress.plan.placement import AFTER, BEFORE, Variant
from act_pipeline.compress.plan.placement_cache import key_of

Question = Mapping[str, Variant]


class Recorded:
    """A :data:`act_pipeline.compress.plan.placement.Measure` that answers from records, and supposes the rest.

    Attributes:
        missing: the measurements that are not recorded, in the order in which they were asked for. If it is empty, the
            decision is final.
    """

    def __init__(self, answers: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Start without questions.

        Args:
            answers: :func:`act_pipeline.compress.plan.placement_cache.key_of` a question -> label -> seconds of each
                round.
        """
        self._answers = answers
        self.missing: list[Question] = []

    def __call__(self, models: Question) -> Mapping[str, Sequence[float]]:
        """Return label -> seconds of each round."""
        found = self._answers.get(key_of(models))
        if found is not None:
            return found
        self.missing.append(models)
        return {label: [0.5 if label == AFTER and BEFORE in models else 1.0] for label in models}
