"""Order of the engines in each round, and statistics of their latencies."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from act_pipeline.evaluation.batches import latency_percentiles


def rounds(labels: Sequence[str], repeats: int, seed: int) -> Iterator[list[str]]:
    """Yield a random permutation of ``labels`` for each round, so that no engine always follows the same other one.

    Args:
        labels: labels of the engines.
        repeats: number of rounds.
        seed: of the permutations.
    """
    order = random.Random(seed)
    for _ in range(repeats):
        turn = list(labels)
        order.shuffle(turn)
        yield turn


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Return ``min``, ``p50``, ``p90``, ``p99``, ``max`` and ``mean`` in milliseconds, of durations in seconds."""
    return {**latency_percentiles(seconds), "mean": round(float(np.mean(seconds)) * 1000, 4)}


def speed_ratio(baseline: Sequence[float], seconds: Sequence[float], name: str) -> dict[str, Any]:
    """Return the speed-up over a baseline; 2.0 means half the duration.

    Args:
        baseline: durations of the baseline in each round, seconds.
        seconds: durations of the compared engine in the same rounds, seconds.
        name: name of the baseline.

    Returns:
        ``to``: the name. ``by_round``: the median over the rounds of the ratio within a round; temporary slow-downs of
        the machine affect both and cancel out, so this one is printed. ``of_p50``: the ratio of the two medians, as
        computed from two latencies in a table.
    """
    count = min(len(baseline), len(seconds))
    ours, theirs = np.asarray(seconds[:count]), np.asarray(baseline[:count])
    return {
        "to": name,
        "by_round": round(float(np.median(theirs / ours)), 4),
        "of_p50": round(float(np.median(theirs) / np.median(ours)), 4),
    }
