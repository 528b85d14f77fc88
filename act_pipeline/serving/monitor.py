"""Watches the answers of each version and acts on the rules: what a server calls for each request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.serving.breach import Breach, Figure
from act_pipeline.serving.cause import COMMON, cause_of
from act_pipeline.serving.counters import COUNTERS_FILENAME, Counters
from act_pipeline.serving.decisions import DEVICE_METRICS, act
from act_pipeline.serving.detections import Seen
from act_pipeline.serving.disagreement import Disagreement
from act_pipeline.serving.labels import mean_average_precision
from act_pipeline.serving.metrics import exposition
from act_pipeline.serving.ranges import RangeProbe, RangeShares
from act_pipeline.serving.repository import Repository
from act_pipeline.serving.routing import choose_version, is_shadowed
from act_pipeline.serving.rules import Rules
from act_pipeline.serving.shadow import FloatModel, Shadow, as_detections
from act_pipeline.serving.temperature import Sensor, Temperature
from act_pipeline.serving.watched import figure_of, rule_state
from act_pipeline.serving.watched_versions import WatchedVersions
from act_pipeline.serving.window import Answer

_logger = logging.getLogger(__name__)
SAVE_SECONDS = 1.0


class Monitor:
    """The monitor of one repository; one process has one, and its threads share it.

    For each request the server calls :meth:`route`, then :meth:`answered` or :meth:`failed`.
    """

    def __init__(
        self,
        repository: Repository,
        rules: Rules,
        float_model: Optional[FloatModel] = None,
        sensor: Optional[Callable[[], Temperature]] = None,
        clock: Callable[[], float] = time.monotonic,
        background: bool = False,
        range_probe: Optional[RangeProbe] = None,
        probe_time: float = 1.0,
    ) -> None:
        """Read the state and the counters.

        Args:
            repository: the repository; other processes may change it meanwhile.
            rules: what is watched.
            float_model: runs the ``inputs`` of :meth:`answered` in the float model and returns ``bbox [K, 6]``, or None
                where the version has no float model; None: there is none at all.
            sensor: reads the temperature; None: the sensors of this machine.
            clock: seconds, never going back.
            background: whether the rules are checked in a thread of their own; otherwise the request whose turn it is
                waits for the check: 10 ms, or seconds when labels have come.
            range_probe: runs the ``inputs`` of :meth:`answered` in the version's INT8 model and returns the shares of
                its activations beyond their ranges; None: nothing tells them.
            probe_time: the largest share of the time that ``range_probe`` may run.

        Raises:
            UserError: the pointer or a version's record is damaged.
        """
        self._repository, self._rules, self._clock = repository, rules, clock
        self._counters = Counters(repository.folder / COUNTERS_FILENAME)
        self._sensor = sensor or Sensor()
        self._lock = threading.RLock()
        self._checking = threading.Lock()
        self._versions = WatchedVersions(repository, rules, clock)
        self._device = [Breach(rule) for rule in rules.rules if rule.metric in DEVICE_METRICS]
        self._temperature, self._readings = self._sensor(), 0
        self._since_check, self._saved = 0, clock()
        self._shadow = None
        range_probe = range_probe if rules.shadow.ranges else None
        if (float_model is not None or range_probe is not None) and rules.shadow.share > 0:
            self._shadow = Shadow(
                float_model, self._compared, self._shadow_failed, rules.shadow.queue, range_probe, self._ranged,
                probe_time,
            )  # fmt: skip
        self._versions.refresh()
        self._due, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._check_when_due, name="rules", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    def route(self, request_id: str) -> Optional[int]:
        """Return the version that is to answer a request; None: nothing is promoted yet.

        Args:
            request_id: the request's id; the same id gets the same version while the shares do not change.
        """
        with self._lock:
            return choose_version(self._versions.refresh(), request_id, self._rules.seed)

    def answered(
        self, version: int, request_id: str, detections: np.ndarray, seconds: float, inputs: Any = None
    ) -> None:
        """Note the answer to a request, and check the rules when it is time.

        Args:
            version: the version that answered.
            request_id: the request's id.
            detections: ``bbox [K, 6]`` of the image: class, score, x1, y1, x2, y2 in pixels of the original image.
                What is not finite or has another shape counts as a failure.
            seconds: how long the request took.
            inputs: what ``float_model`` and ``range_probe`` take; None: the request has no shadow.
        """
        try:
            rows = as_detections(detections)
        except ValueError:
            self.failed(version, request_id, seconds)
            return
        if self._shadow is not None and inputs is not None:
            if is_shadowed(request_id, self._rules.shadow.share, self._rules.seed):
                queued = self._shadow.offer(version, inputs, rows)
                if not queued:
                    self._count(version, "shadow_dropped")
        seen = Seen.of(rows)
        with self._lock:
            watched = self._versions.of.get(version)
            if watched is not None:
                watched.labels.answer(request_id, rows)
            self._counters.add(version, "detections", int(seen.sure.sum()))
        self._add(version, Answer(self._clock(), seconds, seen))

    def failed(self, version: int, request_id: str, seconds: float) -> None:
        """Note a request that the version could not answer; a request that is itself wrong is not noted.

        Args:
            version: the version.
            request_id: the request's id.
            seconds: how long it took.
        """
        with self._lock:
            self._counters.add(version, "errors")
        self._add(version, Answer(self._clock(), seconds, None))

    def post_labels(self, request_id: str, objects: np.ndarray) -> bool:
        """Note the labels of an earlier request, from which the mAP is computed.

        Args:
            request_id: the request's id.
            objects: ``[G, 5]``: class index, x1, y1, x2, y2 in pixels of the original image; empty: no objects.

        Returns:
            False if the answer to the request is not kept any more.

        Raises:
            ValueError: the objects have another shape, or are not finite.
        """
        rows = np.asarray(objects, np.float64)
        rows = rows.reshape(0, 5) if rows.size == 0 else rows
        if rows.ndim != 2 or rows.shape[1] != 5 or not np.isfinite(rows).all():
            raise ValueError(f"objects are {list(rows.shape)}, expected finite rows of 5: class, x1, y1, x2, y2")
        with self._lock:
            for version, watched in self._versions.of.items():
                if watched.labels.post(request_id, rows):
                    self._counters.add(version, "labelled")
                    return True
        return False

    def figures(self) -> dict[str, Any]:
        """Return the figures that :meth:`prometheus` and the page show, values for JSON."""
        with self._lock:
            state = self._versions.refresh()
            roles, shares = state.roles(), state.shares()
            versions = {
                str(version): {
                    "role": roles.get(version),
                    "share": shares.get(version, 0) / 100,
                    "counters": self._counters.of(version),
                    "window": self._versions.figures(version) if version in self._versions.of else None,
                    "rules": self._rule_states(version),
                }
                for version in sorted({*self._counters.versions(), *roles})
            }
            return {
                "state": state.as_json(),
                "temperature": {"celsius": self._temperature.degrees, "source": self._temperature.source},
                "device_rules": [rule_state(breach) for breach in self._device],
                "shadow_waiting": self._shadow.waiting if self._shadow else 0,
                "versions": versions,
            }

    def prometheus(self) -> str:
        """Return the figures in Prometheus' text format, version 0.0.4."""
        return exposition(self.figures())

    def check(self) -> list[dict[str, Any]]:
        """Check the rules now; this is done every ``window.check_every`` requests.

        Returns:
            the log's entries of what was done.
        """
        with self._checking:
            self._score_labels()
            temperature = self._sensor()
            with self._lock:
                self._since_check = 0
                self._temperature = temperature
                self._readings += temperature.degrees is not None
            done = [*self._check_versions(), *self._check_device()]
            if done:
                with self._lock:
                    self._save()
            return done

    def drain_shadow(self) -> None:
        """Wait until the queued shadow requests have run."""
        if self._shadow is not None:
            self._shadow.drain()

    def close(self) -> None:
        """End the threads and save the counters."""
        if self._shadow is not None:
            self._shadow.close()
        if self._thread is not None:
            self._closing = True
            self._due.set()
            self._thread.join()
        with self._lock:
            self._save()

    def _add(self, version: int, answer: Answer) -> None:
        with self._lock:
            self._counters.add(version, "requests")
            watched = self._versions.of.get(version)
            if watched is not None:
                watched.window.add(answer)
            self._since_check += 1
            due = self._since_check >= self._rules.window.check_every
            if due:
                self._since_check = 0
            if self._clock() - self._saved >= SAVE_SECONDS:
                self._save()
        if due and self._thread is None:
            self.check()
        elif due:
            self._due.set()

    def _check_when_due(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._closing:
                return
            try:
                self.check()
            except Exception:  # the thread goes on: without it no rule would act
                _logger.exception("the rules could not be checked")

    def _score_labels(self) -> None:
        """Compute the mAP of the versions that have new labels; takes seconds for some hundred images."""
        with self._lock:
            labels = [watched.labels for watched in self._versions.of.values()]
            due = [(each, each.posted, list(each.labelled.values())) for each in labels if each.scored != each.posted]
        for each, posted, images in due:
            score = mean_average_precision(images)
            with self._lock:
                each.map, each.scored = score, posted

    def _save(self) -> None:
        self._saved = self._clock()
        try:
            self._counters.save()
        except OSError as error:  # a full disk ends no request
            _logger.warning("the counters are not saved: %s", error)

    def _check_versions(self) -> list[dict[str, Any]]:
        done = []
        with self._lock:
            state, watched = self._versions.refresh(), dict(self._versions.of)
            windows = {version: self._versions.figures(version) for version in watched}
        # The candidate first: what it broke is not the live version's fault.
        for version in sorted(windows, key=lambda number: number != state.candidate):
            for breach in watched[version].breaches:
                metric = breach.rule.metric
                figure = figure_of(windows[version], metric)
                if figure.value is not None and breach.rule.is_clear(figure.value):
                    watched[version].common.discard(metric)
                if breach.check(figure):
                    others = {str(other): found[metric] for other, found in windows.items() if other != version}
                    cause = cause_of(breach.rule, version, self._rules, windows, watched)
                    compared = {"others": others, "cause": cause}
                    entry = self._act(version, breach, windows[version], compared)
                    if entry is not None:
                        done.append(entry)
                        if entry["event"] != "alarm":
                            return done  # the versions have changed: the next check looks at the new ones
        return done

    def _check_device(self) -> list[dict[str, Any]]:
        done = []
        for breach in self._device:
            with self._lock:
                state = self._versions.refresh()
            version = state.live if state.candidate is None else state.candidate
            if version is None or not breach.check(Figure(self._temperature.degrees, self._readings)):
                continue
            figures = {"temperature": self._temperature.degrees, "source": self._temperature.source}
            entry = self._act(version, breach, figures, {})
            if entry is not None:
                done.append(entry)
        return done

    def _act(
        self, version: int, breach: Breach, found: dict[str, Any], compared: dict[str, Any]
    ) -> Optional[dict[str, Any]]:
        rule = breach.rule
        with self._lock:
            answered = self._counters.of(version)["requests"]
        figures = {
            "metric": rule.metric,
            "value": found[rule.metric],
            "bound": rule.bound,
            "checks": rule.checks,
            "action": rule.action,
            **compared,
            "figures": {name: value for name, value in found.items() if not isinstance(value, dict)},
            "answered": answered,
        }
        try:
            entry = act(self._repository, version, rule, figures, compared.get("cause") == COMMON)
        except (UserError, OSError) as error:  # the next check tries again; the request is answered all the same
            breach.active = False
            _logger.warning("version %d, %s %s: %s", version, rule.metric, rule.bound, error)
            return None
        with self._lock:
            if entry is not None:
                self._counters.add(version, "decisions")
            self._versions.refresh()
        return entry

    def _rule_states(self, version: int) -> list[dict[str, Any]]:
        watched = self._versions.of.get(version)
        return [rule_state(breach) for breach in watched.breaches] if watched is not None else []

    def _compared(self, version: int, reference: np.ndarray, detections: np.ndarray) -> None:
        found = Disagreement.of(reference, detections)
        with self._lock:
            self._counters.add(version, "shadowed")
            watched = self._versions.of.get(version)
            if watched is not None:
                watched.window.compare(self._clock(), found)

    def _ranged(self, version: int, found: Union[RangeShares, str]) -> None:
        with self._lock:
            watched = self._versions.of.get(version)
            if watched is not None:
                watched.ranged(self._clock(), found)

    def _shadow_failed(self, version: int) -> None:
        self._count(version, "shadow_errors")

    def _count(self, version: int, name: str) -> None:
        with self._lock:
            self._counters.add(version, name)
