"""Sentences about a comparison of INT8 with the float model: its confidence interval, and the detections that agree."""

from __future__ import annotations

from act_pipeline.evaluation.agreement import Agreement
from act_pipeline.evaluation.comparison import AgreementInterval, ComparisonFigures


def certainty_lines(
    found: ComparisonFigures, max_drop: float | None, images: int, min_agreement: float | None = None
) -> list[str]:
    """Return lines about the confidence intervals of mAP difference and agreement, and about the detections in common.

    The verdict is two-sided: the images decide if the interval lies on one side of ``max_drop``. The one-sided share of
    the resamples within ``max_drop`` is stated in a sentence of its own.

    Args:
        found: the comparison; entries that were not measured give no line.
        max_drop: the largest allowed mAP drop; None: any.
        images: number of evaluated images.
        min_agreement: the least agreement; None: any.
    """
    lines = []
    interval = found.map_drop_interval
    if interval is not None:
        lines.append(
            f"{interval.level:.0%} interval of the change: {-interval.high:+.4f} to {-interval.low:+.4f} "
            f"({interval.resamples:,} resamples of these images)"
        )
        if max_drop is not None:
            lines[-1] += f"; {_verdict(found, max_drop, images)}"
    miou = found.miou_drop_interval
    if miou is not None:
        lines.append(
            f"{miou.level:.0%} interval of the change of the masks' mIoU: {-miou.high:+.4f} to {-miou.low:+.4f}"
        )
    value = found.agreement_interval
    if value is not None and (min_agreement is not None or interval is None):
        lines.append(
            f"agreement with FP32: {value.value:.4f}, {value.level:.0%} interval: {value.low:.4f} to {value.high:.4f} "
            f"({value.resamples:,} resamples of these images)"
        )
        if min_agreement is not None:
            lines[-1] += f"; {_agreement_verdict(found, value, min_agreement, images)}"
    if found.agreement is not None:
        lines.append(agreement_line(found.agreement))
        if value is not None and min_agreement is None and interval is not None:
            lines[-1] += f"; agreement (as for min_agreement): {value.value:.4f}"
    return lines


def _verdict(found: ComparisonFigures, max_drop: float, images: int) -> str:
    interval = found.map_drop_interval
    assert interval is not None
    if not found.decides(max_drop):
        needed = found.images_needed
        more = "" if needed is None else f", some {rounded_up(needed):,} could"
        said = f"max_drop {max_drop} is inside it, so {images:,} images cannot tell whether INT8 keeps it{more}"
    elif interval.high <= max_drop:
        said = f"all of it is within max_drop {max_drop}"
    else:
        said = f"all of it is beyond max_drop {max_drop}"
    probability = found.probability_within_max_drop
    return said if probability is None else f"{said} (probability of a drop of at most {max_drop}: {probability:.1%})"


def _agreement_verdict(found: ComparisonFigures, value: AgreementInterval, limit: float, images: int) -> str:
    if not found.decides_agreement(limit):
        needed = found.agreement_images_needed
        more = "" if needed is None else f", some {rounded_up(needed):,} could"
        said = f"min_agreement {limit} is inside it, so {images:,} images cannot tell whether INT8 has it{more}"
    elif value.low >= limit:
        said = f"all of it is at least min_agreement {limit}"
    else:
        said = f"all of it is below min_agreement {limit}"
    sure = found.probability_of_min_agreement
    return said if sure is None else f"{said} (probability of at least {limit}: {sure:.1%})"


def agreement_line(agreed: Agreement) -> str:
    """Return a sentence about how many of the float model's detections INT8 finds, and how they differ."""
    said = f"of the float model's {agreed.boxes:,} detections with a score above 0.3"
    if not agreed.matched:
        return f"{said} INT8 finds none" if agreed.boxes else f"{said} there is nothing to compare"
    return (
        f"{said} INT8 finds {agreed.matched:.1%}, with a mean IoU of {agreed.mean_iou:.4f} and a mean change of "
        f"the score of {agreed.mean_score_change:.4f}"
    )


def rounded_up(count: int) -> int:
    """Return an estimate rounded up to its first two digits."""
    step = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // step) * step
