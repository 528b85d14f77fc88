"""The error of a compression whose best INT8 model is not within ``max_drop`` or does not have ``min_agreement``."""

from __future__ import annotations

from pathlib import Path

from act_pipeline.compress.candidates import MEASURED, Candidate
from act_pipeline.compress.job import Job
from act_pipeline.config import Config
from act_pipeline.core.errors import BelowFloor
from act_pipeline.evaluation import ComparisonFigures
from act_pipeline.evaluation.certainty import rounded_up


def below_max_drop(job: Job, best: Candidate, found: ComparisonFigures, saved_in: Path) -> BelowFloor:
    """Return the error, which states what was reached, what is saved, and what can be done.

    Args:
        job: the compression.
        best: the best candidate.
        found: its comparison with the float model.
        saved_in: the folder of ``best``.
    """
    limits, reached, raised = [], [], []
    if job.tried.max_drop is not None:
        assert job.fp32 is not None, "there is no max_drop without the float model's mAP"
        required = _required(job.config, found.probability_within_max_drop)
        limits.append(f"within max_drop {job.tried.max_drop} of the float model's {job.fp32.map:.4f} mAP{required}")
        reached.append(f"{best.map:.4f}")
        raised.append("raise Strategy.max_drop")
    if job.tried.min_agreement is not None:
        required = _required(job.config, found.probability_of_min_agreement)
        limits.append(f"at min_agreement {job.tried.min_agreement} with the float model{required}")
        reached.append(f"an agreement of {job.tried.agreement(best):.4f}")
        raised.append("lower Strategy.min_agreement")
    return BelowFloor(
        f"no INT8 model is {' and '.join(limits)}: the best, {best.name}, has {' and '.join(reached)}, and is saved in "
        f"{saved_in}; {_remedies(job.config, found, ' or '.join(raised))}"
    )


def _required(config: Config, probability: float | None) -> str:
    """Return the required and the best probability; empty where the measured figure decides."""
    confidence = config.strategy.confidence
    if confidence == MEASURED or probability is None:
        return ""
    return f" with a probability of {confidence:g} (Strategy.confidence; the best has {probability:.3g})"


def _remedies(config: Config, found: ComparisonFigures, raised: str) -> str:
    needed = max(found.images_needed or 0, found.agreement_images_needed or 0)
    more = f"evaluate on more images (some {rounded_up(needed):,} would tell), " if needed else ""
    surer = "" if config.strategy.confidence == MEASURED else "lower Strategy.confidence, "
    return f"{more}{surer}{raised}, calibrate on more images, or train longer"
