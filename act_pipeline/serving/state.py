"""Which version answers which share of the requests, and how promotions and roll backs change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

from act_pipeline.core.errors import UserError

SHARES = (1, 10, 50, 100)
# Versions to roll back to.
MAX_PREVIOUS = 10


@dataclass(frozen=True)
class State:
    """The content of the pointer: the versions in use. Versions are numbers from 1.

    Attributes:
        live: the version that answers; None: nothing is promoted yet.
        candidate: the version that answers a share of the requests (canary); None: there is none.
        share: the candidate's share of the requests, percent; 0 without a candidate.
        spare: a lighter version that may replace the live one; None: there is none.
        previous: versions that were live before, the latest last.
        automatic: whether a rule made the live version live. Rules then only raise alarms: they never take back more
            than one change that a person made.
        change: number of changes so far.
    """

    live: Optional[int] = None
    candidate: Optional[int] = None
    share: int = 0
    spare: Optional[int] = None
    previous: tuple[int, ...] = ()
    automatic: bool = False
    change: int = 0

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> State:
        """Read the state; further keys are ignored.

        Raises:
            ValueError: a value is not of its type.
        """
        values = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        values["previous"] = tuple(values.get("previous", ()))
        state = cls(**values)
        numbers = (state.share, state.change, *state.previous)
        optional = (state.live, state.candidate, state.spare)
        if not all(type(number) is int and number >= 0 for number in numbers) or not all(
            number is None or (type(number) is int and number > 0) for number in optional
        ):
            raise ValueError("versions, share and change are whole numbers")
        return state

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "previous": list(self.previous)}

    def shares(self) -> dict[int, int]:
        """Return version -> share of the requests, percent, of the versions that answer."""
        found = {} if self.live is None else {self.live: 100 - self.share}
        return found if self.candidate is None else {**found, self.candidate: self.share}

    def roles(self) -> dict[int, str]:
        """Return version -> ``live``, ``candidate``, ``spare`` or ``previous``, of the versions in use."""
        found = {version: "previous" for version in self.previous}
        for role, version in (("spare", self.spare), ("candidate", self.candidate), ("live", self.live)):
            if version is not None:
                found[version] = role
        return found


def check_share(share: int) -> None:
    """Check a share of the requests.

    Raises:
        UserError: it is none of :data:`SHARES`.
    """
    if share not in SHARES:
        raise UserError(f"--share is {share}, expected one of {', '.join(map(str, SHARES))} (percent)")


def promoted(state: State, version: int, share: int) -> State:
    """Return the state after a promotion.

    Args:
        state: the state before.
        version: the version that is to answer.
        share: its share of the requests, percent: one of :data:`SHARES`.

    Raises:
        UserError: the share is not allowed, the version is live, nothing is live that could answer the rest, or
            another version has a share.
    """
    check_share(share)
    if state.candidate not in (None, version):
        raise UserError(
            f"version {state.candidate} has {state.share}% of the requests; promote it to 100 or roll it back first"
        )
    if state.live == version:
        raise UserError(f"version {version} is live already; nothing to do")
    if share < 100:
        if state.live is None:
            raise UserError(
                f"no version is live that could answer the other {100 - share}% of the requests; promote the first "
                "version with --share 100"
            )
        return _changed(state, candidate=version, share=share)
    return _live(state, version, automatic=False)


def made_spare(state: State, version: int) -> State:
    """Return the state in which a version is the spare one.

    Raises:
        UserError: it answers requests.
    """
    if version in state.shares():
        raise UserError(f"version {version} answers requests, expected another model as the spare one")
    return _changed(state, spare=version)


def rolled_back(state: State, automatic: bool = False, both: bool = False) -> State:
    """Return the state without the candidate; without a candidate, with the version that was live before.

    Args:
        state: the state before.
        automatic: whether a rule rolls back.
        both: with a candidate, take back the live version too.

    Raises:
        UserError: there is no candidate and no earlier version.
    """
    if state.candidate is not None and not both:
        return _changed(state, candidate=None, share=0)
    if not state.previous:
        raise UserError("there is no earlier version to roll back to; promote another one")
    *rest, version = state.previous
    return _changed(state, live=version, candidate=None, share=0, previous=tuple(rest), automatic=automatic)


def switched_to_spare(state: State) -> State:
    """Return the state in which the spare version is live; a rule made it so.

    Raises:
        UserError: there is no spare version, or it is live.
    """
    if state.spare is None:
        raise UserError("there is no spare version; promote one with --spare")
    if state.spare == state.live:
        raise UserError(f"the spare version {state.spare} is live already")
    return _live(state, state.spare, automatic=True)


def _live(state: State, version: int, automatic: bool) -> State:
    others = [other for other in (*state.previous, state.live) if other not in (None, version)]
    previous = tuple(other for other in others if other is not None)[-MAX_PREVIOUS:]
    return _changed(state, live=version, candidate=None, share=0, previous=previous, automatic=automatic)


def _changed(state: State, **values: Any) -> State:
    return replace(state, change=state.change + 1, **values)
