"""Successive halving: fewer variants on more images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.evaluation import Evaluation, GroundTruth
from act_pipeline.evaluation.batches import Latencies
from act_pipeline.evaluation.comparison import agreement_on_some, compare_on_some
from act_pipeline.evaluation.confidence import TOLERANCE, AgreementLoss, MapDifference
from act_pipeline.search.variants import Variant

# Fewer images would drop variants by chance.
MIN_IMAGES = 16
_SHARES = (4, 2, 1)
# One of so many variants goes on from a step to the next.
_REDUCTION = 3


@dataclass
class Entry:
    """A variant in float and what is known of it.

    Attributes:
        variant: the variant.
        model: its export.
        reader: the data, resized for it.
        reader_overrides: what makes this reader of the config's.
        latencies: its latencies beside the full model's, and how many times as fast it is; None: not timed.
        evaluation: its evaluation on the images of the last step that it took part in.
        difference: mAP - the full model's on the same images.
        loss: agreement with the full model on them - 1; None: not asked for, or no object is detected.
        dropped: why it was dropped; None: it was not.
    """

    variant: Variant
    model: InferenceModel
    reader: Reader
    reader_overrides: tuple[str, ...] = ()
    latencies: Optional[Latencies] = field(default=None, repr=False)
    evaluation: Optional[Evaluation] = field(default=None, repr=False)
    difference: Optional[MapDifference] = None
    loss: Optional[AgreementLoss] = None
    dropped: Optional[str] = None


def steps(images: int) -> list[int]:
    """Return how many images each step evaluates: a quarter, a half and all, if these are enough."""
    found = [-(-images // share) for share in _SHARES]
    return [count for count in found if count >= MIN_IMAGES] or [images]


@dataclass(frozen=True)
class Limits:
    """What variants are held to.

    Attributes:
        reference: evaluation of the full model on all images.
        truth: the ground truth.
        max_drop: the largest drop of mAP.
        min_agreement: the least agreement with the full model; None: any.
    """

    reference: Evaluation
    truth: GroundTruth
    max_drop: float
    min_agreement: Optional[float] = None

    def judge(self, entry: Entry, evaluation: Evaluation) -> None:
        """Set a variant's evaluation, and drop it if the interval of its mAP or agreement lies beyond a limit."""
        entry.evaluation = evaluation
        entry.difference = compare_on_some(self.reference, evaluation, self.truth)
        images = f"on {evaluation.images} images, surely"
        if entry.difference is not None and entry.difference.high < -self.max_drop:
            entry.dropped = f"mAP {entry.difference.difference:+.4f} {images} beyond max_drop"
        entry.loss = None if self.min_agreement is None else agreement_on_some(self.reference, evaluation)
        if entry.dropped is None and entry.loss is not None and 1 + entry.loss.high < (self.min_agreement or 0.0):
            entry.dropped = f"agreement {entry.loss.agreement:.4f} with the full model {images} below min_agreement"


def halve(
    entries: Sequence[Entry], evaluate: Callable[[Entry, Optional[int]], Evaluation], limits: Limits, keep: int = 1
) -> list[Entry]:
    """Evaluate variants on more and more images, and drop those that are worse.

    After each step those are dropped that are surely beyond the limits (:meth:`Limits.judge`), and before the next step
    all but the better third, see :func:`ranked`.

    Args:
        entries: the variants without the full model, with their latencies; their evaluations are set. Those that were
            evaluated on the images of the first step already are not evaluated on them again.
        evaluate: evaluates a variant on the first so many images; None: on all.
        limits: what they are held to.
        keep: so many go on at least.

    Returns:
        The variants that were evaluated on all images and dropped by no step.
    """
    alive = list(entries)
    counts = steps(limits.reference.images)
    for number, count in enumerate(counts):
        last = number == len(counts) - 1
        for entry in alive:
            if entry.evaluation is None or entry.evaluation.images != count:
                limits.judge(entry, evaluate(entry, None if last else count))
        alive = [entry for entry in alive if entry.dropped is None]
        if not last:
            for entry in ranked(alive, limits)[max(keep, -(-len(alive) // _REDUCTION)) :]:
                entry.dropped = f"others are faster or better on {count} images"
            alive = [entry for entry in alive if entry.dropped is None]
    return alive


def ranked(entries: Sequence[Entry], limits: Limits) -> list[Entry]:
    """Return variants in the order of the speed that they promise, the best first.

    That is the probability of being within the limits times what they are faster than the full model: on few images a
    variant that is measured to lie below ``max_drop`` may be within it, and one that gains nothing is of no use. Equal
    ones are in the order of their mAP.
    """
    return sorted(entries, key=lambda entry: _promise(entry, limits), reverse=True)


def _promise(entry: Entry, limits: Limits) -> tuple[float, float]:
    chances = [1.0]
    if entry.difference is not None:
        chances.append(entry.difference.probability(limits.max_drop))
    if limits.min_agreement is not None and entry.loss is not None:
        chances.append(entry.loss.probability(1 - limits.min_agreement))
    faster = max(entry.latencies.ratio - 1, 0.0) if entry.latencies else 0.0
    return min(chances) * faster, entry.evaluation.map if entry.evaluation else 0.0


def within(entry: Entry, limits: Limits) -> bool:
    """Return whether the measured drop and agreement are within the limits; True without labelled objects."""
    least = limits.min_agreement
    agrees = least is None or entry.loss is None or entry.loss.agreement >= least - TOLERANCE
    return agrees and (entry.difference is None or entry.difference.difference >= -limits.max_drop)
