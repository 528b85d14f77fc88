"""Successive halving: fewer variants on more images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.evaluation import Evaluation, GroundTruth
from act_pipeline.evaluation.comparison import agreement_on_some, compare_on_some
from act_pipeline.evaluation.confidence import TOLERANCE, AgreementLoss, MapDifference
from act_pipeline.search.pareto import by_fronts
from act_pipeline.search.variants import Variant

# Fewer images would drop variants by chance.
MIN_IMAGES = 16
_SHARES = (4, 2, 1)


@dataclass
class Entry:
    """A variant in float and what is known of it.

    Attributes:
        variant: the variant.
        model: its export.
        reader: the data, resized for it.
        reader_overrides: what makes this reader of the config's.
        latency_ms: median latency of the full model in ms, divided by this one's speed-up.
        evaluation: its evaluation on the images of the last step that it took part in.
        difference: mAP - the full model's on the same images.
        loss: agreement with the full model on them - 1; None: not asked for, or no object is detected.
        dropped: why it was dropped; None: it was not.
    """

    variant: Variant
    model: InferenceModel
    reader: Reader
    reader_overrides: tuple[str, ...] = ()
    latency_ms: float = 0.0
    evaluation: Optional[Evaluation] = field(default=None, repr=False)
    difference: Optional[MapDifference] = None
    loss: Optional[AgreementLoss] = None
    dropped: Optional[str] = None


def steps(images: int) -> list[int]:
    """Return how many images each step evaluates: a quarter, a half and all, if these are enough."""
    found = [-(-images // share) for share in _SHARES]
    return [count for count in found if count >= MIN_IMAGES] or [images]


def halve(
    entries: Sequence[Entry],
    evaluate: Callable[[Entry, Optional[int]], Evaluation],
    reference: Evaluation,
    truth: GroundTruth,
    max_drop: float,
    keep: int = 1,
    min_agreement: Optional[float] = None,
) -> list[Entry]:
    """Evaluate variants on more and more images, and drop those that are worse.

    After each step those are dropped whose interval of the change of mAP lies beyond ``max_drop``, or whose interval of
    the agreement lies below ``min_agreement``, and before the next step all but the better half, see :func:`ranked`.

    Args:
        entries: the variants without the full model, with their latencies; their evaluations are set.
        evaluate: evaluates a variant on the first so many images; None: on all.
        reference: evaluation of the full model on all images.
        truth: the ground truth.
        max_drop: the largest drop of mAP.
        keep: so many go on at least.
        min_agreement: the least agreement with the full model; None: any.

    Returns:
        The variants that were evaluated on all images and dropped by no step.
    """
    alive = list(entries)
    counts = steps(reference.images)
    for number, count in enumerate(counts):
        last = number == len(counts) - 1
        for entry in alive:
            entry.evaluation = evaluate(entry, None if last else count)
            entry.difference = compare_on_some(reference, entry.evaluation, truth)
            if entry.difference is not None and entry.difference.high < -max_drop:
                entry.dropped = f"mAP {entry.difference.difference:+.4f} on {count} images, surely beyond max_drop"
            entry.loss = None if min_agreement is None else agreement_on_some(reference, entry.evaluation)
            if entry.dropped is None and entry.loss is not None and 1 + entry.loss.high < (min_agreement or 0.0):
                entry.dropped = (
                    f"agreement {entry.loss.agreement:.4f} with the full model on {count} images, surely below "
                    "min_agreement"
                )
        alive = [entry for entry in alive if entry.dropped is None]
        if not last:
            for entry in ranked(alive, max_drop, min_agreement)[max(keep, -(-len(alive) // 2)) :]:
                entry.dropped = f"others are faster or better on {count} images"
            alive = [entry for entry in alive if entry.dropped is None]
    return alive


def ranked(entries: Sequence[Entry], max_drop: float, min_agreement: Optional[float] = None) -> list[Entry]:
    """Return variants, the best first: those within the limits, then in the order of their Pareto fronts."""
    order = by_fronts([(entry.latency_ms, entry.evaluation.map if entry.evaluation else 0.0) for entry in entries])
    found = [entries[place] for place in order]
    return sorted(found, key=lambda entry: not within(entry, max_drop, min_agreement))


def within(entry: Entry, max_drop: float, min_agreement: Optional[float] = None) -> bool:
    """Return whether the measured drop and agreement are within the limits; True without labelled objects."""
    agrees = min_agreement is None or entry.loss is None or entry.loss.agreement >= min_agreement - TOLERANCE
    return agrees and (entry.difference is None or entry.difference.difference >= -max_drop)
