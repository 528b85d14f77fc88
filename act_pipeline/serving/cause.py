"""Whether a figure that is out of bounds is the fault of one version, or of what all versions are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from act_pipeline.serving.rules import LOAD_METRICS, STREAM_METRICS, Rule, Rules
from act_pipeline.serving.watched import Watched, figure_of

# A cause: the version itself, or the requests and the machine, which all versions share.
VERSION, COMMON = "version", "common"


def cause_of(
    rule: Rule, version: int, rules: Rules, windows: Mapping[int, Mapping[str, Any]], watched: Mapping[int, Watched]
) -> Optional[str]:
    """Return why a version's figure is out of bounds: ``version``, ``common``, or None if nothing tells.

    The other version answers requests of the same stream at the same time, so it has the figure too if the stream or
    the load has changed. What was found of it stays with the live version when the candidate is gone, until the figure
    is back. Without another version the float model tells: pictures on which both find the same have changed.

    Args:
        rule: the rule that is broken.
        version: the version that broke it.
        rules: all rules.
        windows: version -> figures of its window.
        watched: the versions; that the cause is common is noted in them.
    """
    if rule.metric not in (*STREAM_METRICS, *LOAD_METRICS):
        return None
    known = {}
    for other, window in windows.items():
        figure = figure_of(window, rule.metric)
        # A look at the other version needs less than an action upon it.
        if other != version and figure.value is not None and 2 * figure.count >= rule.min_count:
            known[other] = rule.is_clear(figure.value)
    affected = [other for other, clear in known.items() if not clear]
    if affected:
        for each in (version, *affected):
            watched[each].common.add(rule.metric)
    if rule.metric in watched[version].common:
        return COMMON
    if known:
        return VERSION
    return _by_the_float_model(rules, windows[version]) if rule.metric in STREAM_METRICS else None


def _by_the_float_model(rules: Rules, window: Mapping[str, Any]) -> Optional[str]:
    for rule in rules.rules:
        if rule.metric == "disagreement":
            figure = figure_of(window, rule.metric)
            if figure.value is not None and figure.count >= rule.min_count:
                return VERSION if rule.is_out(figure.value) else COMMON
    return None
