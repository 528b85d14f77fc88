"""The rules of a monitor, read from YAML: what is watched, and what a breach does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from act_pipeline.config.schema import Invalid, Source, build, key
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.yaml_files import apply_overrides, load_yaml, parse_override
from act_pipeline.serving.ranges import MOST_IMAGES

DEFAULT_RULES = Path("configs/serving/rules.yml")
Metric = Literal[
    "disagreement",
    "psi",
    "psi_worst_class",
    "detections_change",
    "beyond_range",
    "p50_ms",
    "p99_ms",
    "error_rate",
    "temperature",
    "map",
    "map_drop",
]
# The least and the greatest value of a figure, where it has them.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("disagreement", "error_rate", "map"), (0.0, 1.0)),
    "map_drop": (-1.0, 1.0),
    "temperature": (-273.15, math.inf),
}
_NOT_NEGATIVE = (0.0, math.inf)
Action = Literal["roll_back", "switch_to_spare", "alarm"]
# Figures that follow the pictures, and those that follow the load of the machine: all versions have them in common.
STREAM_METRICS = ("psi", "psi_worst_class", "detections_change", "beyond_range")
LOAD_METRICS = ("p50_ms", "p99_ms")
_DEFAULT_COUNT = 100
# What ``min_count`` counts where it is not requests.
_COUNTED = {"beyond_range": "shadowed images", "map": "labelled images", "map_drop": "labelled images"}


@dataclass(frozen=True)
class WindowSettings:
    """Section ``window``: which requests the figures are of.

    Attributes:
        requests: the last so many of each version.
        seconds: none that is older.
        check_every: the rules are checked after so many requests.
        labelled: the last so many labelled images, and answers that wait for labels.
    """

    requests: int = key(500, at_least=1, at_most=100_000)
    seconds: float = key(600.0, above=0)
    check_every: int = key(20, at_least=1)
    labelled: int = key(500, at_least=1, at_most=100_000)


@dataclass(frozen=True)
class ShadowSettings:
    """Section ``shadow``: the requests that run in the float model too, and in a probe of the INT8 model.

    Attributes:
        share: share of the requests, percent; 0: none.
        queue: the most requests that wait; more are dropped and counted.
        ranges: whether the shares of activations beyond their calibrated ranges are computed for them.
    """

    share: float = key(5.0, at_least=0, at_most=100)
    queue: int = key(16, at_least=1, at_most=10_000)
    ranges: bool = True


@dataclass(frozen=True)
class Rule:
    """An entry of ``rules``.

    Attributes:
        metric: the figure.
        above, below: the bound; one of the two.
        clear: the breach is over when the figure is within this bound; by default the bound itself.
        min_count: the least number of requests that the figure is computed from: shadowed images for
            ``disagreement`` and ``beyond_range`` (which is of the last 50), labelled images for ``map`` and
            ``map_drop``, readings for ``temperature``.
        checks: consecutive checks out of bounds before the action.
        action: what to do.
    """

    metric: Metric
    above: Optional[float] = None
    below: Optional[float] = None
    clear: Optional[float] = None
    min_count: int = key(_DEFAULT_COUNT, at_least=1)
    checks: int = key(2, at_least=1)
    action: Action = "alarm"

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise Invalid("above", "and below are both given or both missing, expected one of the two")
        low, high = _RANGES.get(self.metric, _NOT_NEGATIVE)
        for name in ("above", "below", "clear"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise Invalid(name, f"is {value:g}, expected {_interval(low, high)}, as {self.metric} is")
        if high == self.above or low == self.below:
            name, value = ("above", high) if self.below is None else ("below", low)
            raise Invalid(name, f"is {value:g}, and {self.metric} is never {name} it, expected {_interval(low, high)}")
        if self.clear is not None and self.is_out(self.clear):
            side = "at most" if self.above is not None else "at least"
            raise Invalid(
                "clear",
                f"is {self.clear:g}, at which the rule ({self.bound}) is broken, expected {side} "
                f"{self.above if self.above is not None else self.below:g}",
            )

    def same_as(self, other: Rule) -> bool:
        """Return whether another rule is of the same figure on the same side, and does the same."""
        one, two = ((each.metric, each.above is None, each.action) for each in (self, other))
        return one == two

    @property
    def bound(self) -> str:
        """The bound in words, such as ``above 0.1``."""
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"

    def is_out(self, value: float) -> bool:
        """Return whether a value is out of bounds."""
        if self.above is not None:
            return value > self.above
        return self.below is not None and value < self.below

    def is_clear(self, value: float) -> bool:
        """Return whether a value ends a breach."""
        if self.clear is None:
            return not self.is_out(value)
        return value <= self.clear if self.above is not None else value >= self.clear


@dataclass(frozen=True)
class Rules:
    """The content of the file.

    Attributes:
        path: the file.
        window: section ``window``.
        shadow: section ``shadow``.
        rules: the list ``rules``.
        seed: seed of the choice of requests for the candidate and for the shadow.
    """

    path: Path = key(from_yaml=False)
    window: WindowSettings = key(factory=WindowSettings)
    shadow: ShadowSettings = key(factory=ShadowSettings)
    rules: list[Rule] = key(factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        for index, rule in enumerate(self.rules):
            for before, other in enumerate(self.rules[:index]):
                if rule.same_as(other):
                    raise Invalid(
                        f"rules[{index}]",
                        f"is {rule.metric} {rule.bound}, {rule.action}; rules[{before}] is the same, {other.bound}: "
                        "remove one of them, or give it another action",
                    )
            most = self._most(rule)
            if most is not None and rule.min_count > most:
                raise Invalid(
                    f"rules[{index}].min_count",
                    f"is {rule.min_count} ({_DEFAULT_COUNT} if it is missing), and {rule.metric} is of the last {most} "
                    f"{_COUNTED.get(rule.metric, 'requests')} at most: it is never reached, expected at most {most}",
                )
            if rule.metric in ("disagreement", "beyond_range") and not self.shadow.share:
                raise Invalid(f"rules[{index}].metric", f"is {rule.metric}, which needs shadow.share above 0")
            if rule.metric == "beyond_range" and not self.shadow.ranges:
                raise Invalid(f"rules[{index}].metric", "is beyond_range, which needs shadow.ranges: true")

    def _most(self, rule: Rule) -> Optional[int]:
        if rule.metric == "temperature":
            return None
        if rule.metric == "beyond_range":
            return MOST_IMAGES
        return self.window.labelled if rule.metric in ("map", "map_drop") else self.window.requests


def _interval(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"


def load_rules(path: str | os.PathLike[str] = DEFAULT_RULES, overrides: Iterable[str] = ()) -> Rules:
    """Read and check a file of rules.

    Args:
        path: the file; ``configs/...`` of this package too.
        overrides: ``section.key=value`` each, set over the file's values.

    Raises:
        UserError: the file is not YAML, or a section, key, type or value does not fit.
    """
    path, overrides = find_shipped(path), list(overrides)
    content = apply_overrides(load_yaml(path), overrides)
    source = Source(path, tuple(".".join(parse_override(override)[0]) for override in overrides))
    return build(Rules, content, source, path=path)
