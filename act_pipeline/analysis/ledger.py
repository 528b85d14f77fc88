"""What has been measured, kept line by line as it comes, so that a run that is broken off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_pipeline.core.records import as_number, write_text_atomically


class Ledger:
    """A file of JSON lines: the first says what is measured, each other is a measurement.

    A line that a kill cut off, or that is no measurement, is left out when the file is read, and so is all that was
    measured of something else.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        """Read what is there.

        Args:
            path: the file; its folder exists.
            key: of the task; measurements of another are dropped.
        """
        self.path = Path(path)
        self.measurements: list[dict[str, Any]] = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        read = [entry for entry in map(_parsed, lines) if entry is not None]
        if read and read[0].get("key") == key:
            self.measurements = [entry for entry in read[1:] if _is_measurement(entry)]
        # Written anew: a measurement must not be appended to half a line.
        write_text_atomically(
            self.path, "".join(f"{json.dumps(entry)}\n" for entry in [{"key": key}, *self.measurements])
        )

    def add(self, measurement: Mapping[str, Any]) -> None:
        """Keep a measurement."""
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
