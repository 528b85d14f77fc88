"""Pareto fronts of latency and mAP."""

from __future__ import annotations

from collections.abc import Sequence

# Latency in ms (less is better) and mAP (more is better).
Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point dominates, the fastest first.

    A point dominates another if it is at least as good in both, and better in one.
    """
    found = [place for place, point in enumerate(points) if not any(_dominates(other, point) for other in points)]
    return sorted(found, key=lambda place: points[place])


def _dominates(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other
