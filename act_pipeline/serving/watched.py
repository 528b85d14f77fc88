"""What a monitor knows of one version that answers requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Optional, Union

from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.breach import Breach, Figure
from act_pipeline.serving.decisions import DEVICE_METRICS
from act_pipeline.serving.labels import Labels
from act_pipeline.serving.ranges import MOST_IMAGES, RangeShares, range_figures
from act_pipeline.serving.rules import Rules
from act_pipeline.serving.window import Window

# The count that a figure's ``min_count`` is about, where it is not the number of requests.
_COUNTS = {"disagreement": "shadowed", "beyond_range": "ranged", "map": "labelled", "map_drop": "labelled"}


class Watched:
    """A version since it has had requests.

    Attributes:
        window: its last requests.
        labels: its answers that wait for labels, and the labelled ones.
        breaches: the state of each rule of versions.
        baseline: what its detections are compared with; None: nothing.
        origin: what the baseline is of: ``calibration`` or ``evaluation`` images, ``version N``; None: there is none.
        recorded_map: mAP of its evaluation; None: not known.
        ranges: share of the activations beyond their ranges on the calibration images, by tensor; empty: not recorded.
        common: metrics whose breach is not its own fault, see :mod:`act_pipeline.serving.cause`.
    """

    def __init__(
        self,
        rules: Rules,
        baseline: Optional[Baseline],
        recorded_map: Optional[float],
        ranges: Optional[Mapping[str, float]] = None,
    ) -> None:
        self.window = Window(rules.window.requests, rules.window.seconds)
        self.labels = Labels(rules.window.labelled)
        self.breaches = [Breach(rule) for rule in rules.rules if rule.metric not in DEVICE_METRICS]
        self.baseline, self.origin = baseline, baseline.source if baseline else None
        self.recorded_map = recorded_map
        self.common: set[str] = set()
        self.ranges = ranges or {}
        self._ranged: deque[tuple[float, RangeShares]] = deque(maxlen=MOST_IMAGES)
        self._range_note: Optional[str] = None

    def ranged(self, at: float, found: Union[RangeShares, str]) -> None:
        """Note what the activations of one image are; a text: why it cannot be told."""
        if isinstance(found, str):
            self._range_note = found
        else:
            self._ranged.append((at, found))

    def range_figures(self, now: float) -> dict[str, Any]:
        """Return the figures of the last images, see :func:`act_pipeline.serving.ranges.range_figures`."""
        while self._ranged and self._ranged[0][0] < now - self.window.seconds:
            self._ranged.popleft()
        return range_figures([found for _, found in self._ranged], self.ranges, self._range_note)


def figure_of(window: Mapping[str, Any], metric: str) -> Figure:
    """Return the figure of a rule's metric, from the figures of a version's window."""
    return Figure(window[metric], window[_COUNTS.get(metric, "requests")])


def rule_state(breach: Breach) -> dict[str, Any]:
    """Return a rule and whether it is broken, values for JSON."""
    rule = breach.rule
    return {"metric": rule.metric, "bound": rule.bound, "action": rule.action, "active": breach.active}
