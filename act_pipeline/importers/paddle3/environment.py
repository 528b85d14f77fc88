"""The Python that reads models of Paddle 3: an environment of its own in the user's cache, or one that is named."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from act_pipeline.core.cache_dir import cache_directory
from act_pipeline.core.defaults import REQUIREMENTS
from act_pipeline.core.errors import UserError

LOCK = REQUIREMENTS / "paddle3.txt"
_INSTALLER = REQUIREMENTS / "install.py"
_OLDEST, _TOO_NEW = (3, 0), (3, 3)
_SIZES = "about 260 MB to download, 900 MB on disk"
_FLAG = "--paddle3_python"
_KEY_DIGITS = 16
_PROBE_TIMEOUT_S = 120
# paddlepaddle-gpu has the same modules; importing them would take seconds.
_PROBE = """
from importlib.metadata import PackageNotFoundError, version
for names in (("paddlepaddle", "paddlepaddle-gpu"), ("paddle2onnx",)):
    found = ""
    for name in names:
        try:
            found = found or version(name)
        except PackageNotFoundError:
            pass
    print(found or "none")
"""


@dataclass(frozen=True)
class Paddle3:
    """A Python with Paddle 3.

    Attributes:
        python: the interpreter.
        paddle: version of paddlepaddle.
        paddle2onnx: version of paddle2onnx.
    """

    python: Path
    paddle: str
    paddle2onnx: str


def find_paddle3(python: str | os.PathLike[str] | None = None) -> Paddle3:
    """Return a Python with paddlepaddle 3.0 to 3.2 and paddle2onnx 2; make its environment if there is none.

    Args:
        python: an interpreter that has both; None: the environment of this package in the user's cache.

    Raises:
        UserError: the interpreter does not start or has other versions, or the environment cannot be made.
    """
    if python is not None:
        return _probed(Path(python), f"{_FLAG} {python}")
    environment = make_environment()
    return _probed(environment / "bin" / "python", str(environment / "bin" / "python"))


def environment_directory(lock: Path = LOCK) -> Path:
    """Return the folder of the environment that a lock describes: one for each content of the lock.

    Raises:
        UserError: the lock is missing.
    """
    try:
        content = lock.read_bytes()
    except OSError:
        raise UserError(
            f"{lock} is missing, expected the lock of the environment for Paddle 3; install this package again, or "
            f"give a Python with paddlepaddle 3.2 and paddle2onnx 2.1 with {_FLAG}"
        ) from None
    return cache_directory() / "paddle3" / hashlib.sha256(content).hexdigest()[:_KEY_DIGITS]


def make_environment(lock: Path = LOCK, installer: Path = _INSTALLER) -> Path:
    """Make the environment unless it is complete; a second process that wants it waits for the first.

    What is complete, the installer tells by a stamp that it writes last; an interrupted installation is continued.

    Args:
        lock: the lock file.
        installer: ``requirements/install.py``.

    Returns:
        Its folder.

    Raises:
        UserError: it cannot be made, offline for example.
    """
    directory = environment_directory(lock)
    if not (directory / "bin" / "python").exists():
        _say(f"paddle3: making an environment with Paddle 3 in {directory}, once ({_SIZES})")
    command = [sys.executable, "-I", str(installer), "--venv", str(directory), str(lock)]
    last = ""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            if not line.startswith("error:"):
                _say(line.rstrip())
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        reason = last.removeprefix("error: ") or f"{installer.name} ended with {code}"
        raise UserError(
            f"the environment for Paddle 3 cannot be made: {reason}; offline, make one where there is a network "
            f"(python3 -m venv paddle3; paddle3/bin/pip install -r {lock}), bring it here, and give {_FLAG} "
            "paddle3/bin/python"
        )
    return directory


def _probed(python: Path, where: str) -> Paddle3:
    command = [str(python), "-I", "-c", _PROBE]
    try:
        probe = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROBE_TIMEOUT_S, check=False
        )
        lines = probe.stdout.split()
        reason = (
            ""
            if probe.returncode == 0 and len(lines) == 2
            else (probe.stderr.strip().splitlines() or ["no answer"])[-1]
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, reason = [], getattr(error, "strerror", None) or "no answer"
    if reason:
        raise UserError(f"{where} does not run as a Python 3 ({reason[:200]}), expected the path of an interpreter")
    paddle, paddle2onnx = lines
    if not _OLDEST <= _version(paddle) < _TOO_NEW or _version(paddle2onnx)[:1] != (2,):
        raise UserError(
            f"{where} has paddlepaddle {paddle} and paddle2onnx {paddle2onnx}, expected 3.0 to 3.2 and 2: install "
            f"{LOCK} there, or leave {_FLAG} out"
        )
    return Paddle3(python, paddle, paddle2onnx)


def _version(text: str) -> tuple[int, ...]:
    """Return the leading two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
