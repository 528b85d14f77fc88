"""Counters that go on after a restart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from act_pipeline.core.atomic_files import write_text_atomically

COUNTERS_SCHEMA, COUNTERS_FILENAME = "act_pipeline.counters/1", "counters.json"
COUNTED = ("requests", "errors", "detections", "shadowed", "shadow_dropped", "shadow_errors", "labelled", "decisions")


class Counters:
    """Counts by version since the repository was made.

    The file is replaced as a whole, so that a killed process leaves that of its last :meth:`save`.
    """

    def __init__(self, path: Path) -> None:
        """Go on from a file; a missing or damaged one counts from 0.

        Args:
            path: the file.
        """
        self._path = path
        self._counts: Counter[tuple[int, str]] = Counter()
        self._saved = ""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for version, counts in found["versions"].items():
                for name in COUNTED:
                    self._counts[int(version), name] = max(int(counts.get(name, 0)), 0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._counts.clear()

    def add(self, version: int, name: str, count: int = 1) -> None:
        """Count.

        Args:
            version: the version.
            name: one of :data:`COUNTED`.
            count: how many.
        """
        self._counts[version, name] += count

    def of(self, version: int) -> dict[str, int]:
        """Return name -> count of a version."""
        return {name: self._counts[version, name] for name in COUNTED}

    def versions(self) -> list[int]:
        """Return the versions that anything was counted for, ascending."""
        return sorted({version for version, _ in self._counts})

    def save(self) -> None:
        """Write the file, unless nothing has changed."""
        versions = {str(version): self.of(version) for version in self.versions()}
        text = json.dumps({"schema": COUNTERS_SCHEMA, "versions": versions}, indent=1) + "\n"
        if text != self._saved:
            write_text_atomically(self._path, text)
            self._saved = text
