"""What a broken rule does to the versions, with its figures in the audit log."""

from __future__ import annotations

from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.serving.repository import Repository
from act_pipeline.serving.rules import STREAM_METRICS, Rule
from act_pipeline.serving.state import State, rolled_back, switched_to_spare

# The figure is of the device, not of one version: every version on it is concerned.
DEVICE_METRICS = ("temperature",)


def act(
    repository: Repository, version: int, rule: Rule, figures: dict[str, Any], common: bool = False
) -> Optional[dict[str, Any]]:
    """Do what a rule says, once; where that is not possible, raise an alarm that says why.

    Args:
        repository: the repository.
        version: the version that broke the rule.
        rule: the rule.
        figures: what the decision is based on, for the log.
        common: whether the figure is out of bounds for every version, by the stream or the load.

    Returns:
        the log's entry; None: another process has taken the version off the requests meanwhile.

    Raises:
        UserError: the repository cannot be changed.
    """
    with repository.changing() as state:
        if version not in state.shares():
            return None
        about = {"version": version, "role": state.roles()[version], "by": "rule", **figures}
        if rule.action == "alarm":
            return repository.note("alarm", **about)
        try:
            event, after = _after(state, version, rule, common)
        except UserError as error:
            return repository.note("alarm", **about, instead_of=rule.action, reason=str(error))
        return repository.change(after, event, **about)


def _after(state: State, version: int, rule: Rule, common: bool) -> tuple[str, State]:
    """Return the event and the new state.

    Raises:
        UserError: nothing can take the version's place, or another one would do no better.
    """
    has_spare = rule.action == "switch_to_spare" and state.spare not in (None, state.live)
    # A hot device is the fault of no version: the spare one is lighter than both.
    if version == state.candidate and not (has_spare and rule.metric in DEVICE_METRICS):
        return "roll_back", rolled_back(state)
    # The candidate could not be judged on such requests; the live version is as good as any other of its size.
    if common and not (has_spare and rule.metric not in STREAM_METRICS):
        raise UserError("it is not this version's fault: the requests or the load have changed for every version")
    if state.automatic:
        raise UserError(f"a rule made version {state.live} live already; a person decides what comes next")
    if has_spare:
        return "switch_to_spare", switched_to_spare(state)
    # With the live version in doubt, nothing supports the candidate either.
    return "roll_back", rolled_back(state, automatic=True, both=True)
