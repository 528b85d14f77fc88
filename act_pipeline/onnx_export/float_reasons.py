"""Why ops of an INT8 model stayed float, as the compression wrote it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record

_RECORDED = ("kept_ops", "weight_only_ops")


def float_reasons(model: InferenceModel) -> dict[str, dict[str, str]]:
    """Return what ``act.json`` beside a model says about ops in float.

    Args:
        model: an INT8 model; one of PaddleSlim's own ACT has no record.

    Returns:
        Output of the op -> ``{"reason", "module"}``, of which either may be missing. Empty without a readable record.
    """
    try:
        record = read_record(model.directory / ACT_FILENAME, ACT_SCHEMA)
    except UserError:  # the export needs no record
        return {}
    found: dict[str, dict[str, str]] = {}
    for entries in (record.get(key) for key in _RECORDED):
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and isinstance(entry.get("output"), str):
                found[entry["output"]] = _told(entry)
    return found


def _told(entry: Mapping[str, Any]) -> dict[str, str]:
    return {key: entry[key] for key in ("reason", "module") if isinstance(entry.get(key), str)}
