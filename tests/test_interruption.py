"""Signals of every command: one line, and the exit code 130 or 143, whatever is running and whatever Paddle does.

Each in a process of its own: a thread that an earlier test left in this one could answer the signal.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from act_pipeline.core.errors import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parents[1]
ENDED = "interrupted: nothing half-written is left behind\n"
PROGRAM = """
import os, signal, sys, time
import act_pipeline.core.interruption as interruption
from act_pipeline.cli.main import ended_by_signals, run_command

{main}

raise SystemExit(run_command(ended_by_signals(main)))
"""


def ended(main: str, **options) -> subprocess.CompletedProcess:
    """Run a command in a process; ``main`` is the source of its function."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(main=main)], stdout=subprocess.PIPE, text=True, env=environment,
        timeout=120, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_import_of_paddle_is_one_line(name: str) -> None:
    """Paddle's own handler prints a traceback of C++ on SIGTERM."""
    done = ended(
        f"""
def main(argv):
    import paddle
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
""",
        stderr=subprocess.PIPE,
    )
    assert done.stderr == ENDED
    assert done.returncode == {"SIGINT": EXIT_INTERRUPTED, "SIGTERM": 143}[name]


def test_a_signal_while_paddle_loads_its_library_waits_for_it() -> None:
    """Paddle prints a line about any exception that comes meanwhile."""
    done = ended(
        """
def main(argv):
    sys.modules["paddle.base.core"] = sys  # stands in for it
    sys.__spec__._initializing = True
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.2)
    print("loaded", flush=True)
    sys.__spec__._initializing = False
    time.sleep(60)
""",
        stderr=subprocess.PIPE,
    )
    assert (done.stderr, done.stdout, done.returncode) == (ENDED, "loaded\n", 143)


def test_a_signal_where_python_drops_exceptions_ends_the_command_all_the_same() -> None:
    done = ended(
        """
class Dropping:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

def main(argv):
    Dropping()
    while True:
        time.sleep(0.05)
""",
        stderr=subprocess.PIPE,
    )
    assert (done.stderr, done.returncode) == (ENDED, 143)


@pytest.mark.parametrize("pressed", [True, False])
def test_an_import_that_swallows_ctrl_c_ends_as_ctrl_c(pressed: bool) -> None:
    """Modules in C turn an exception that comes while they are imported into an error of their own."""
    done = ended(
        f"""
def main(argv):
    try:
        if {pressed}:
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise ImportError("initialization failed")
""",
        stderr=subprocess.PIPE,
    )
    if pressed:
        assert (done.stderr, done.returncode) == (ENDED, EXIT_INTERRUPTED)
    else:
        assert done.returncode == 1 and "ImportError: initialization failed" in done.stderr


def test_a_command_with_a_handler_of_its_own_takes_its_time() -> None:
    """``serve`` answers the requests that have arrived, which may take longer than the time limit of the others."""
    done = ended(
        """
interruption.interruptible.__wrapped__.__defaults__ = (0.2,)

def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1)
    return 7
""",
        stderr=subprocess.PIPE,
    )
    assert (done.stderr, done.returncode) == ("", 7)


@pytest.mark.parametrize("then", ["raise", "time.sleep(60)"], ids=["ends", "does not end in time"])
def test_the_message_does_not_stand_behind_a_bar(then: str) -> None:
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = ended(
        f"""
from act_pipeline.core.progress import each
interruption.interruptible.__wrapped__.__defaults__ = (0.2,)

def main(argv):
    batches = each(range(10), "evaluate", "batch")
    for _ in batches:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            {then}
""",
        stderr=end,
    )
    os.close(end)
    text = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert done.returncode == 143 and "evaluate:" in text
    assert not text.split("interrupted: ")[0].split("\n")[-1].split("\r")[-1].strip(), text
