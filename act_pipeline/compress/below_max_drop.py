"""The error of a compression whose best INT8 model is not within ``Strategy.max_drop``."""

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
    assert job.fp32 is not None, "there is no max_drop without the float model's mAP"
    return BelowFloor(
        f"no INT8 model is within max_drop {job.tried.max_drop} of the float model's {job.fp32.map:.4f} mAP"
        f"{_required(job.config, found)}: the best, {best.name}, has {best.map:.4f}, and is saved in {saved_in}; "
        f"{_remedies(job.config, found)}"
    )


def _required(config: Config, found: ComparisonFigures) -> str:
    """Return the required and the best probability; empty where the measured drop decides."""
    probability, confidence = found.probability_within_max_drop, config.strategy.confidence
    if confidence == MEASURED or probability is None:
        return ""
    return f" with a probability of {confidence:g} (Strategy.confidence; the best has {probability:.3g})"


def _remedies(config: Config, found: ComparisonFigures) -> str:
    needed = found.images_needed
    more = "" if needed is None else f"evaluate on more images (some {rounded_up(needed):,} would tell), "
    surer = "" if config.strategy.confidence == MEASURED else "lower Strategy.confidence, "
    return f"{more}{surer}raise Strategy.max_drop, calibrate on more images, or train longer"
