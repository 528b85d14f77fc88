"""The last requests of one version, and the figures that are computed from them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from act_pipeline.serving.baseline import Baseline
from act_pipeline.serving.detections import Seen, joined
from act_pipeline.serving.disagreement import Disagreement
from act_pipeline.serving.histograms import BIN_NAMES, psi, size_shares

# The least detections of a class for a PSI of its own: with fewer, chance alone gives large ones.
CLASS_DETECTIONS = 100
# A change of the objects an image that is smaller than so many of its standard errors is put down to chance.
STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Answer:
    """A request.

    Attributes:
        at: when it was answered, seconds of the monitor's clock.
        seconds: how long it took.
        seen: the detections; None: it failed.
    """

    at: float
    seconds: float
    seen: Optional[Seen]


@dataclass
class Window:
    """The last requests of a version, at most ``length`` and none older than ``seconds``.

    Attributes:
        length: the most requests.
        seconds: the greatest age.
        answers: the requests, the oldest first.
        shadowed: time and comparison of those that ran in the float model too.
    """

    length: int
    seconds: float
    answers: deque[Answer] = field(default_factory=deque)
    shadowed: deque[tuple[float, Disagreement]] = field(default_factory=deque)

    def add(self, answer: Answer) -> None:
        """Add a request."""
        self.answers.append(answer)
        self._forget(answer.at)

    def compare(self, at: float, found: Disagreement) -> None:
        """Add the comparison of a request with the float model."""
        self.shadowed.append((at, found))
        self._forget(at)

    def figures(self, now: float, reference: Optional[Baseline]) -> WindowFigures:
        """Return the figures at a time.

        Args:
            now: seconds of the monitor's clock.
            reference: what the detections are compared with; None: nothing.
        """
        self._forget(now)
        return WindowFigures.of(list(self.answers), [found for _, found in self.shadowed], now, reference)

    def baseline(self) -> Optional[Baseline]:
        """Return the detections in the window as the baseline of another version; None without any request."""
        answered = [answer.seen for answer in self.answers if answer.seen is not None]
        if not answered:
            return None
        return _baseline(answered)

    def _forget(self, now: float) -> None:
        while self.answers and (len(self.answers) > self.length or self.answers[0].at < now - self.seconds):
            self.answers.popleft()
        while self.shadowed and (len(self.shadowed) > self.length or self.shadowed[0][0] < now - self.seconds):
            self.shadowed.popleft()


@dataclass(frozen=True)
class WindowFigures:
    """Figures of the requests in a window; None where there is nothing to compute them from.

    Attributes:
        requests, errors: number of requests, and of those that failed.
        error_rate: errors / requests.
        p50_ms, p99_ms: latency of the answered requests.
        fps: requests a second, from the first request in the window to now.
        detections: objects (scores above 0.3) an image, mean.
        detections_change: absolute change of ``detections`` relative to the reference's; 0: chance explains it.
        scores: class index -> counts of the score bins.
        psi: of all scores, compared with the reference; images without a detection are a bin too.
        psi_class: class index -> PSI, of classes with at least 100 detections in both.
        psi_worst_class: the largest of these.
        sizes: share of small, medium and large objects.
        side_px: ``p10``, ``p50``, ``p90`` of the square roots of the objects' areas.
        shadow: sums of the comparisons with the float model.
    """

    requests: int
    errors: int
    error_rate: Optional[float]
    p50_ms: Optional[float]
    p99_ms: Optional[float]
    fps: Optional[float]
    detections: Optional[float]
    detections_change: Optional[float]
    scores: dict[int, list[int]]
    psi: Optional[float]
    psi_class: dict[int, float]
    psi_worst_class: Optional[float]
    sizes: dict[str, float]
    side_px: dict[str, float]
    shadow: Disagreement

    @classmethod
    def of(
        cls, answers: list[Answer], shadowed: list[Disagreement], now: float, reference: Optional[Baseline]
    ) -> WindowFigures:
        """Compute the figures; for the arguments see :meth:`Window.figures`."""
        parts = [answer.seen for answer in answers if answer.seen is not None]
        seen, made = joined(parts), _baseline(parts)
        errors = len(answers) - len(parts)
        taken = np.array([answer.seconds for answer in answers if answer.seen is not None]) * 1000
        sides = seen.sides[seen.sure]
        by_class = _psi_by_class(reference, made)
        span = now - answers[0].at if answers else 0.0
        return cls(
            requests=len(answers),
            errors=errors,
            error_rate=errors / len(answers) if answers else None,
            p50_ms=float(np.percentile(taken, 50)) if len(taken) else None,
            p99_ms=float(np.percentile(taken, 99)) if len(taken) else None,
            fps=len(answers) / span if span > 0 else None,
            detections=made.detections if parts else None,
            detections_change=_relative_change(reference, made) if parts else None,
            scores={index: list(row) for index, row in made.classes.items()},
            psi=psi(reference.histogram, made.histogram) if reference and parts else None,
            psi_class=by_class,
            psi_worst_class=max(by_class.values(), default=None),
            sizes=size_shares(sides),
            side_px={f"p{at}": float(np.percentile(sides, at)) for at in (10, 50, 90)} if len(sides) else {},
            shadow=Disagreement.total(shadowed),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the figures under the names of the rules' metrics, and what else the page shows."""
        plain = ("requests", "errors", "error_rate", "p50_ms", "p99_ms", "fps", "detections", "detections_change")
        return {
            **{name: getattr(self, name) for name in plain},
            "psi": self.psi,
            "psi_worst_class": self.psi_worst_class,
            "psi_class": {str(index): value for index, value in self.psi_class.items()},
            "scores": {str(index): dict(zip(BIN_NAMES, row)) for index, row in self.scores.items()},
            "sizes": self.sizes,
            "side_px": self.side_px,
            "shadowed": self.shadow.images,
            "disagreement": self.shadow.change,
            "matched": self.shadow.matched_share,
            "mean_iou": self.shadow.mean_iou,
            "score_shift": self.shadow.mean_score_shift,
        }


def _psi_by_class(reference: Optional[Baseline], made: Baseline) -> dict[int, float]:
    if reference is None:
        return {}
    pairs = {
        index: (reference.classes[index], row) for index, row in made.classes.items() if index in reference.classes
    }
    return {
        index: psi(np.array(before), np.array(row))
        for index, (before, row) in pairs.items()
        if min(sum(before), sum(row)) >= CLASS_DETECTIONS
    }


def _baseline(parts: list[Seen]) -> Baseline:
    objects = np.array([part.sure.sum() for part in parts], np.int64)
    return Baseline.of(joined(parts), len(parts), sum(not len(part.scores) for part in parts), objects=objects)


def _relative_change(reference: Optional[Baseline], made: Baseline) -> Optional[float]:
    """Return the change of the objects an image if it is beyond its standard errors, otherwise 0.

    Both means are of a sample of images. The larger of the two variances is taken for both, since a sample without any
    object has none.
    """
    if reference is None or not reference.detections or not reference.images:
        return None
    variance = max(reference.variance, made.variance)
    error = (variance * (1 / reference.images + 1 / made.images)) ** 0.5
    change = abs(made.detections - reference.detections)
    return change / reference.detections if change > STANDARD_ERRORS * error else 0.0
