"""The work of `test_executors.py` in other processes; it imports no module that is slow to load."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from act_pipeline.core.errors import UserError, run_command  # noqa: E402
from act_pipeline.core.process_pool import Work, run_work  # noqa: E402


def times(shared: int, unit: int) -> tuple[int, int, str]:
    """Return the product, the process, and a variable of its environment."""
    return shared * unit, os.getpid(), os.environ.get("WORK_FIXTURES", "")


def refuse(shared: Any, unit: int) -> int:
    if unit == 2:
        raise UserError("unit 2 is refused")
    return unit


def die(shared: Any, unit: int) -> int:
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def sleep(folder: str, unit: int) -> int:
    """Create a temporary folder, record it under the process id, and sleep for a minute; unit 0 returns at once."""
    Path(folder, f"{os.getpid()}.pid").write_text(tempfile.mkdtemp())
    if unit:
        time.sleep(60)
    return unit


def main(argv: Any = None) -> int:
    list(run_work(Work(sleep, sys.argv[1], name="the sleep"), [1, 2, 3, 4], workers=2))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background parent may ignore the signal
    sys.exit(run_command(main))
