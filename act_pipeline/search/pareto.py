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


def by_fronts(points: Sequence[Point]) -> list[int]:
    """Return the indices of all points: those of the front, then of the front of the rest, and so on."""
    order: list[int] = []
    rest = list(range(len(points)))
    while rest:
        found = [rest[place] for place in front([points[index] for index in rest])]
        order += found
        rest = [index for index in rest if index not in found]
    return order


def _dominates(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other
