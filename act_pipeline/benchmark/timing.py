"""Order of the engines in each round, their batches, and ratios of their latencies."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from act_pipeline.benchmark.rows import SpeedRatio


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


def in_batches(images: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return images ``name -> [N, ...]`` as ``name -> [batches, size, ...]``, without those that fill no batch."""
    count = len(images["image"]) // size
    return {name: array[: count * size].reshape(count, size, *array.shape[1:]) for name, array in images.items()}


def speed_ratio(baseline: Sequence[float], seconds: Sequence[float], name: str) -> SpeedRatio:
    """Return the speed-up over a baseline.

    Args:
        baseline: durations of the baseline in each round, seconds.
        seconds: durations of the compared engine in the same rounds, seconds.
        name: name of the baseline.
    """
    count = min(len(baseline), len(seconds))
    ours, theirs = np.asarray(seconds[:count]), np.asarray(baseline[:count])
    return SpeedRatio(
        to=name,
        by_round=round(float(np.median(theirs / ours)), 4),
        of_p50=round(float(np.median(theirs) / np.median(ours)), 4),
    )
