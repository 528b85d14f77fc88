"""What a monitor knows of one version that answers requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.breach import Breach, Figure
from act_pipeline.serving.decisions import DEVICE_METRICS
from act_pipeline.serving.labels import Labels
from act_pipeline.serving.rules import Rules
from act_pipeline.serving.window import Window

# The count that a figure's ``min_count`` is about, where it is not the number of requests.
_COUNTS = {"disagreement": "shadowed", "map": "labelled", "map_drop": "labelled"}


class Watched:
    """A version since it has had requests.

    Attributes:
        window: its last requests.
        labels: its answers that wait for labels, and the labelled ones.
        breaches: the state of each rule of versions.
        baseline: what its detections are compared with; None: nothing.
        origin: where the baseline is from: ``recorded``, or ``version N``; None: there is none.
        recorded_map: mAP of its evaluation; None: not known.
        common: metrics whose breach is not its own fault, see :mod:`act_pipeline.serving.cause`.
    """

    def __init__(self, rules: Rules, baseline: Optional[Baseline], recorded_map: Optional[float]) -> None:
        self.window = Window(rules.window.requests, rules.window.seconds)
        self.labels = Labels(rules.window.labelled)
        self.breaches = [Breach(rule) for rule in rules.rules if rule.metric not in DEVICE_METRICS]
        self.baseline, self.origin = baseline, "recorded" if baseline else None
        self.recorded_map = recorded_map
        self.common: set[str] = set()


def figure_of(window: Mapping[str, Any], metric: str) -> Figure:
    """Return the figure of a rule's metric, from the figures of a version's window."""
    return Figure(window[metric], window[_COUNTS.get(metric, "requests")])


def rule_state(breach: Breach) -> dict[str, Any]:
    """Return a rule and whether it is broken, values for JSON."""
    rule = breach.rule
    return {"metric": rule.metric, "bound": rule.bound, "action": rule.action, "active": breach.active}
