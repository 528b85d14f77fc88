"""Measurements of a placement in the user's cache: an interrupted run continues, a repeated one decides at once.

The decision follows from the measurements, so only these are stored, each as soon as it is finished. They are those of
one structure of a model, one runtime, its version and one CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.compress.plan.placement import Measure, Variant
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.cache_dir import cache_directory

FOLDER = "placements"
_SCHEMA = "act_pipeline.placement/1"


class StoredMeasurements:
    """A :data:`act_pipeline.compress.plan.placement.Measure` that looks up what was measured before.

    Attributes:
        path: the file.
        reused: number of measurements that were found there.
        made: number of measurements that were made.
    """

    def __init__(self, measure: Measure, identity: Mapping[str, Any], folder: Path | None = None) -> None:
        """Read the file of these circumstances, if there is one.

        Args:
            measure: makes a measurement.
            identity: all that latencies depend on, in JSON types.
            folder: of the files; None: in the user's cache.
        """
        text = json.dumps([_SCHEMA, identity], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = (folder or cache_directory() / FOLDER) / f"{name}.json"
        self.reused = self.made = 0
        self._measure, self._identity = measure, dict(identity)
        self._known: dict[str, dict[str, list[float]]] = _read(self.path)

    def __call__(self, models: Mapping[str, Variant]) -> Mapping[str, Sequence[float]]:
        """Return label -> seconds of each round."""
        key = key_of(models)
        if self._known.get(key, {}).keys() == models.keys():
            self.reused += 1
            return self._known[key]
        self._known[key] = {label: [float(value) for value in taken] for label, taken in self._measure(models).items()}
        self.made += 1
        record = {"schema": _SCHEMA, "of": self._identity, "measurements": self._known}
        with contextlib.suppress(OSError):  # a cache that cannot be written is ignored
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.path, json.dumps(record))
        return self._known[key]


def key_of(models: Mapping[str, Variant]) -> str:
    """Return what a measurement is found by: its labels and models."""
    described = {label: ops if isinstance(ops, str) else sorted(ops) for label, ops in models.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): {str(label): [float(value) for value in taken] for label, taken in found.items()}
            for key, found in record["measurements"].items()
            if record["schema"] == _SCHEMA and len(set(map(len, found.values()))) == 1
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
