"""Whether a rule is broken for long enough to act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from act_pipeline.serving.rules import Rule


@dataclass(frozen=True)
class Figure:
    """A figure at a check.

    Attributes:
        value: the figure; None: there is nothing to compute it from.
        count: number of requests, images or readings that it is computed from.
    """

    value: Optional[float]
    count: int


@dataclass
class Breach:
    """The state of one rule for one version.

    Attributes:
        rule: the rule.
        out: consecutive checks in which the figure was out of bounds.
        active: whether the rule has acted and the figure has not come back since.
    """

    rule: Rule
    out: int = 0
    active: bool = False

    def check(self, figure: Figure) -> bool:
        """Return whether the rule acts now; True once, until the figure is within ``clear`` again.

        Args:
            figure: the figure; one that is computed from fewer than ``min_count`` changes nothing.
        """
        if figure.value is None or figure.count < self.rule.min_count:
            return False
        if self.active:
            if self.rule.is_clear(figure.value):
                self.active, self.out = False, 0
            return False
        if not self.rule.is_out(figure.value):
            self.out = 0
            return False
        self.out += 1
        self.active = self.out >= self.rule.checks
        return self.active
