"""Records: JSON files with a schema and the versions of what wrote them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.package_versions import versions

# Records that are read by another stage than the one that writes them; other schemas are defined next to their writers.
ACT_SCHEMA, ACT_FILENAME = "act_pipeline.act/1", "act.json"
ANALYSIS_SCHEMA, ANALYSIS_FILENAME = "act_pipeline.analysis/1", "analysis.json"
RANGES_SCHEMA, RANGES_FILENAME = "act_pipeline.ranges/1", "ranges.json"
BENCHMARK_SCHEMA = "act_pipeline.benchmark/1"
SEARCH_SCHEMA, SEARCH_FILENAME = "act_pipeline.search/1", "search.json"


def write_record(path: str | os.PathLike[str], schema: str, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically.

    Args:
        path: the file to write.
        schema: added as ``schema``, such as ``act_pipeline.eval/1``.
        record: values for JSON, without NaN and infinity; ``versions`` is added unless present.
    """
    body = {"schema": schema, **record}
    body.setdefault("versions", versions())
    write_text_atomically(path, json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(path: str | os.PathLike[str], schema: str) -> dict[str, Any]:
    """Read a record written by :func:`write_record`.

    Args:
        path: the file.
        schema: the expected schema.

    Returns:
        The record, including ``schema`` and ``versions``.

    Raises:
        UserError: the file is missing, cannot be read, is not a JSON object, or has another schema.
    """
    source = Path(path)
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{source} is missing, expected a record ({schema}); the command that makes it has not run here"
        ) from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{source} is a folder or lies in a file, expected a record ({schema})") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}), expected a record ({schema})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is no JSON: {error}; delete it and run again") from None
    if not isinstance(record, dict) or record.get("schema") != schema:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{source}: schema is {found!r}, expected {schema!r}; delete it and run again")
    return record


def as_number(value: Any) -> float | None:
    """Return a JSON value as a float; None if it is not a number, not finite, or too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None
