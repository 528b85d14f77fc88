"""Which engine runs when, and what follows from the times."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from act_pipeline.evaluation.batches import latency_percentiles


def rounds(labels: Sequence[str], repeats: int, seed: int) -> Iterator[list[str]]:
    """Yield all of ``labels`` ``repeats`` times, each time in another order, so that none always follows the same."""
    order = random.Random(seed)
    for _ in range(repeats):
        turn = list(labels)
        order.shuffle(turn)
        yield turn


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Return ``min``, ``p50``, ``p90``, ``p99``, ``max`` and ``mean`` in milliseconds."""
    return {**latency_percentiles(seconds), "mean": round(float(np.mean(seconds)) * 1000, 4)}


def speed_ratio(baseline: Sequence[float], seconds: Sequence[float], name: str) -> dict[str, Any]:
    """Return how many times as fast as a baseline something is; 2.0: it takes half the time.

    Args:
        baseline: seconds of each round, of what is compared with.
        seconds: seconds of the same rounds, of what is compared.
        name: of the baseline.

    Returns:
        ``to``: the name. ``by_round``: the median over the rounds of the ratio within a round; what slows the machine
        down for a while slows both down and drops out, so this is the one that is printed. ``of_p50``: the ratio of the
        two medians, which is what one gets from two latencies of a table.
    """
    count = min(len(baseline), len(seconds))
    ours, theirs = np.asarray(seconds[:count]), np.asarray(baseline[:count])
    return {
        "to": name,
        "by_round": round(float(np.median(theirs / ours)), 4),
        "of_p50": round(float(np.median(theirs) / np.median(ours)), 4),
    }
