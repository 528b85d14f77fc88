"""The audit log of a repository: JSON lines that are only ever appended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.serving.durable_files import append_durably

AUDIT_FILENAME = "audit.jsonl"


@dataclass(frozen=True)
class AuditLog:
    """What happened to the versions of a repository, and why.

    Attributes:
        path: the file.
    """

    path: Path

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; the disk has it when this returns. The caller holds the repository's lock.

        Args:
            entry: values for JSON, without NaN and infinity.
        """
        append_durably(self.path, json.dumps(entry, ensure_ascii=False, allow_nan=False))

    def entries(self) -> list[dict[str, Any]]:
        """Return the entries, the oldest first; a line that a killed process left incomplete is skipped."""
        return list(self._entries())

    def _entries(self) -> Iterator[dict[str, Any]]:
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict):
                    yield entry

    def last_change(self) -> int:
        """Return the number of the last change of the pointer that has its entry; 0: none."""
        numbers = (entry.get("change") for entry in self._entries())
        return max((number for number in numbers if isinstance(number, int)), default=0)
