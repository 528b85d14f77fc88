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
from act_pipeline.core.process_pool import run_work  # noqa: E402
from act_pipeline.core.work import Work  # noqa: E402


class Session:
    """Keeps what is shared."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def close(self) -> None:
        """Nothing is held."""


class Times(Session):
    def __call__(self, unit: int) -> tuple[int, int, str]:
        """Return the product, the process, and a variable of its environment."""
        return self.shared * unit, os.getpid(), os.environ.get("WORK_FIXTURES", "")


class Refuse(Session):
    def __call__(self, unit: int) -> int:
        if unit == 2:
            raise UserError("unit 2 is refused")
        return unit


class Die(Session):
    def __call__(self, unit: int) -> int:
        if unit == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit


class Fail(Session):
    def __call__(self, unit: int) -> int:
        raise ValueError(f"unit {unit} fails")


class Unsendable(Session):
    def __call__(self, unit: int) -> Any:
        return lambda: unit


class NoteClosing(Times):
    def close(self) -> None:
        Path(os.environ["WORK_FIXTURES"], f"{os.getpid()}.closed").touch()


class Sleep(Session):
    def __call__(self, unit: int) -> int:
        """Leave a temporary folder and the process's number behind, and take a minute; unit 0 comes back at once."""
        Path(self.shared, f"{os.getpid()}.pid").write_text(tempfile.mkdtemp())
        if unit:
            time.sleep(60)
        return unit


def main(argv: Any = None) -> int:
    list(run_work(Work(Sleep, sys.argv[1], name="the sleep"), [1, 2, 3, 4], workers=2))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background parent may ignore the signal
    sys.exit(run_command(main))
