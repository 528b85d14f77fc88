"""The versions that answer requests, as the pointer names them: what is watched of each, and its reference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.repository import PointerWatch, Repository
from act_pipeline.serving.rules import Rules
from act_pipeline.serving.state import State
from act_pipeline.serving.watched import Watched

_logger = logging.getLogger(__name__)
# The live version's window serves as the reference of a version without a recorded one from so many requests on.
REFERENCE_REQUESTS = 100


class WatchedVersions:
    """Follows the pointer of a repository; the caller sees to it that one thread at a time calls it.

    Attributes:
        of: number -> what is watched, of each version that answers requests.
    """

    def __init__(self, repository: Repository, rules: Rules, clock: Callable[[], float]) -> None:
        """Watch nothing yet; :meth:`refresh` does.

        Args:
            repository: the repository; other processes may change it meanwhile.
            rules: what is watched.
            clock: seconds, never going back.
        """
        self.of: dict[int, Watched] = {}
        self._repository, self._rules, self._clock = repository, rules, clock
        self._pointer = PointerWatch(repository)
        self._state = self._refused = State()

    def refresh(self) -> State:
        """Return the present state, having followed a change of it.

        A change to a version that cannot be read is not followed: those of before go on answering.

        Raises:
            UserError: there are none of before.
        """
        state = self._pointer.state()
        if state not in (self._state, self._refused):
            try:
                self._follow(state)
            except UserError as error:
                if self._state.live is None:
                    raise
                self._refused = state
                _logger.warning("the change of versions is not followed: %s", error)
        return self._state

    def figures(self, version: int) -> dict[str, Any]:
        """Return the figures of the last requests of a version that is watched, values for JSON."""
        watched = self.of[version]
        reference, origin = self._reference(version)
        found, score = watched.window.figures(self._clock(), reference), watched.labels.map
        drop = watched.recorded_map - score if watched.recorded_map is not None and score is not None else None
        labelled = len(watched.labels.labelled)
        ranges = watched.range_figures(self._clock())
        return {
            **found.as_json(),
            **ranges,
            "psi_reference": origin,
            "map": score,
            "map_drop": drop,
            "labelled": labelled,
        }

    def _follow(self, state: State) -> None:
        new = [self._repository.version(version) for version in state.shares() if version not in self.of]
        before = self.of.get(self._state.live or 0)
        former = before.window.baseline() if before is not None else None
        for version in set(self.of) - set(state.shares()):
            del self.of[version]
        for record in new:
            self.of[record.number] = Watched(self._rules, record.baseline, record.map, record.ranges)
        # A version that has no baseline of its own is compared with the one that it replaced.
        now_live = self.of.get(state.live or 0)
        if now_live is not None and now_live.baseline is None and former and former.images >= REFERENCE_REQUESTS:
            now_live.baseline, now_live.origin = former, f"version {self._state.live}"
        self._state = state

    def _reference(self, version: int) -> tuple[Optional[Baseline], Optional[str]]:
        """Return what a version's detections are compared with, and where that is from."""
        watched, live = self.of[version], self._state.live
        if watched.baseline is not None or live in (None, version):
            return watched.baseline, watched.origin
        other = self.of[live or 0].window.baseline()
        enough = other is not None and other.images >= REFERENCE_REQUESTS
        return (other, f"version {live}") if enough else (None, None)
