"""Measurements appended to a file line by line, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.records import as_number


class Ledger:
    """A JSON Lines file: the first line has the key of the task, each further line one measurement.

    Truncated lines, lines that are no measurements, and measurements of another task are dropped when the file is read.

    Attributes:
        path: the file.
        measurements: all measurements, those read from the file first.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        """Read the existing measurements and rewrite the file.

        Args:
            path: the file; its folder must exist.
            key: key of the task; measurements of another task are dropped.
        """
        self.path = Path(path)
        self.measurements: list[dict[str, Any]] = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        read = [entry for entry in map(_parsed, lines) if entry is not None]
        if read and read[0].get("key") == key:
            self.measurements = [entry for entry in read[1:] if _is_measurement(entry)]
        # Rewrite the file, so that no measurement is appended to a truncated line.
        write_text_atomically(
            self.path, "".join(f"{json.dumps(entry)}\n" for entry in [{"key": key}, *self.measurements])
        )

    def add(self, measurement: Mapping[str, Any]) -> None:
        """Append a measurement to the file."""
        self.measurements.append(dict(measurement))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(dict(measurement))}\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_measurement(entry: Mapping[str, Any]) -> bool:
    figures = [value for name, value in entry.items() if name not in ("op", "batch")]
    return (
        isinstance(entry.get("op"), str)
        and isinstance(entry.get("batch"), int)
        and all(as_number(figure) is not None for figure in figures)
        and ({"signal", "noise", "agreement", "objects"} <= set(entry) or "map" in entry)
    )
