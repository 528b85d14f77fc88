"""Says what is installed, what this machine has, and which engines can run here: ``python -m act_pipeline.doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from act_pipeline.doctor.diagnosis import diagnose
from act_pipeline.doctor.probe import probe
from act_pipeline.doctor.tables import format_diagnosis

EXIT_CANNOT_RUN = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; returns 0 if FP32 and INT8 can run here on the CPU, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.probe:
        probe(arguments.probe)
        return 0
    diagnosis = diagnose()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        print(format_diagnosis(diagnosis))
    return 0 if diagnosis.can_run else EXIT_CANNOT_RUN
