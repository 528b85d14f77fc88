"""Imports and engines, tried in a process of their own, which may crash."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from act_pipeline.core.fresh_process import package_environment
from act_pipeline.core.openvino_telemetry import without_openvino_telemetry
from act_pipeline.doctor.requirements import REQUIREMENTS

_LIMIT_SECONDS = 300


def probe(report: Path) -> None:
    """Try the imports and ask the engines, writing a JSON line after each to ``report``: a crash shows where it was.

    It is for a process of its own.
    """
    with without_openvino_telemetry(), report.open("w", encoding="utf-8", buffering=1) as lines:

        def tell(**facts: Any) -> None:
            lines.write(json.dumps(facts) + "\n")
            lines.flush()

        for module in [requirement.module for requirement in REQUIREMENTS if requirement.module]:
            tell(trying=module)
            tell(module=module, failure=_import_failure(module))
        tell(trying="act_pipeline.engines")
        try:
            tell(**_engine_facts())
        except Exception as error:  # engines import what may be missing
            tell(module="act_pipeline.engines", failure=_error_line(error))


def _import_failure(module: str) -> str:
    try:
        __import__(module)
    except Exception as error:  # a package that does not fit raises anything
        return _error_line(error)
    return ""


def _engine_facts() -> dict[str, Any]:
    from act_pipeline import engines

    machine = engines.machine()
    return {
        "machine": {**dataclasses.asdict(machine), "absent": dict(machine.absent)},
        "engines": [dataclasses.asdict(entry) for entry in engines.support()],
    }


def _error_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_probe() -> dict[str, Any]:
    """Run :func:`probe` in a process of its own.

    Returns:
        ``imports`` (module -> "" or what went wrong), ``machine`` (a dict, or None) and ``engines`` (a list of dicts).
    """
    with tempfile.TemporaryDirectory(prefix="act_pipeline.") as folder:
        report = Path(folder) / "probe.jsonl"
        command = [sys.executable, "-m", "act_pipeline.doctor", "--probe", str(report)]
        try:
            ended = subprocess.run(
                command, env=package_environment(), capture_output=True, timeout=_LIMIT_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            ended = None
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    return read_probe(text, ended)


def read_probe(text: str, ended: int | None) -> dict[str, Any]:
    """Read what :func:`probe` wrote; ``ended`` is its exit code, below zero for a signal, None if it was stopped."""
    result: dict[str, Any] = {"imports": {}, "machine": None, "engines": []}
    trying = ""
    for line in text.splitlines():
        try:
            facts = json.loads(line)
        except ValueError:  # the line that a crash cut short
            continue
        trying = facts.get("trying", trying)
        if "module" in facts:
            result["imports"][facts["module"]] = facts["failure"]
        if "machine" in facts:
            result["machine"], result["engines"] = facts["machine"], facts["engines"]
    if ended != 0 and trying:
        result["imports"][trying] = f"importing {trying} {_how_it_ended(ended)}"
    return result


def _how_it_ended(ended: int | None) -> str:
    if ended is None:
        return f"did not end in {_LIMIT_SECONDS} s"
    if ended < 0:
        return f"ended the process with signal {-ended} ({signal.Signals(-ended).name})"
    return f"ended the process with exit code {ended}"
