"""Make a virtual environment from lock files: once, and again only when a lock has changed.

    python3 requirements/install.py requirements/cpu.txt requirements/dev.txt

It runs before anything is installed, and on a Python that may be too old: the standard library only, and no syntax
that Python 3.6 cannot read. ``--no-deps`` is needed because paddleslim 2.6.0 and paddledet 2.6.0 contradict each other
in what they declare; the locks hold everything that is needed (see pyproject.toml).
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 9)
NEWEST = (3, 12)
EXIT_USER_ERROR = 2
# Two packages that put different files under one name: an environment holds one of the two locks.
_EXCLUSIVE = {"cpu.txt": "gpu.txt", "gpu.txt": "cpu.txt"}
_STAMP = ".installed.json"
_SHOWN_LINES = 12


class InstallError(Exception):
    """What was found, what was expected and what to do next, in one line."""


def say(line):  # type: (str) -> None
    """Print one line at once, so that it stands before what takes the time."""
    print(line, flush=True)


def is_supported(version):  # type: (tuple) -> bool
    """Tell whether the locks serve this Python, given as (major, minor)."""
    return OLDEST <= tuple(version) <= NEWEST


def find_python():  # type: () -> str
    """Return the running Python if the locks serve it, else another one from the PATH that they serve."""
    if is_supported(sys.version_info[:2]):
        return sys.executable
    for minor in (11, 12, 10, 9):
        name = f"python3.{minor}"
        path = shutil.which(name)
        # A name on the PATH can be a version manager's stub that refuses to start: ask it.
        if path and subprocess.call([path, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            say(f"python: {sys.executable} is Python {platform.python_version()}; taking {name} instead")
            return path
    raise InstallError(
        f"{sys.executable} is Python {platform.python_version()}, expected 3.9 to 3.12 (paddlepaddle 2.6.2 has "
        "wheels for these): install one, then "
        "`make PYTHON=/path/to/python3.11 ...`"
    )


def check_platform():  # type: () -> None
    """Raise InstallError where paddlepaddle 2.6.2 and the rest of the lock have no wheels."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise InstallError(
            f"this is {system} on {machine}, expected Linux on x86_64 (what the locks are made for): use such a "
            "machine or a "
            "container of that kind"
        )


def read_stamp(venv):  # type: (Path) -> dict
    """Return what was installed (lock name -> SHA-256), or an empty dict if that is not known or no longer holds."""
    if not (venv / "bin" / "python").exists():  # a dangling link too: the Python it was made from is gone
        return {}
    try:
        stamp = json.loads((venv / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv, stamp):  # type: (Path, dict) -> None
    """Write what is installed, whole or not at all."""
    draft = venv / (_STAMP + ".draft")
    draft.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    os.replace(str(draft), str(venv / _STAMP))


def make_venv(python, venv):  # type: (str, Path) -> None
    """Make the virtual environment, with pip, in place of whatever was there."""
    probe = subprocess.run(
        [python, "-c", "import ensurepip, venv, platform; print(platform.python_version())"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if probe.returncode != 0:
        raise InstallError(
            f"{python} has no venv or ensurepip, expected both: install them (Debian, Ubuntu: apt-get install "
            "python3-venv, "
            "or python3.X-venv for a Python 3.X of its own), then run this again"
        )
    say(f"environment: making {venv} with Python {probe.stdout.strip()}")
    made = subprocess.run(
        [python, "-m", "venv", "--clear", str(venv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode != 0:
        last = (made.stdout.strip().splitlines() or ["no message"])[-1]
        raise InstallError(f"{python} -m venv {venv} failed: {last}")


def count_packages(lock):  # type: (Path) -> int
    """Return how many packages a lock names (a name counts once, however many Pythons it has a version for)."""
    text = lock.read_text(encoding="utf-8")
    return len(set(re.findall(r"^([A-Za-z0-9][\w.\-]*)==", text, re.MULTILINE)))


def install(venv, lock):  # type: (Path, Path) -> None
    """Install a lock with pip; the hashes are checked. Raises InstallError with pip's last words."""
    total = count_packages(lock)
    say(f"environment: installing {total} packages from {lock} into {venv}")
    command = [
        str(venv / "bin" / "python"),
        "-I",
        "-m",
        "pip",
        "install",
        "--require-hashes",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar",
        "off",
        # Byte code for all 8,700 files is most of pip's work; Python writes it for those that are ever imported.
        "--no-compile",
        "-r",
        str(lock),
    ]
    # A PIP_USER or `user = true` of the person's own would turn pip away from the environment.
    environment = dict(os.environ, PIP_USER="0", PYTHONUNBUFFERED="1")
    started, collected, shown = time.time(), 0, 0
    last_lines = collections.deque(maxlen=_SHOWN_LINES)
    with (venv / "install.log").open("w", encoding="utf-8") as log:
        pip = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            universal_newlines=True,
            errors="replace",
        )
        try:
            for line in pip.stdout:
                log.write(line)
                if "ERROR" in line or not line.startswith("WARNING"):
                    last_lines.append(line.rstrip())
                if line.startswith(("Collecting ", "Requirement already satisfied")):
                    collected += 1
                    if collected - shown >= max(total // 4, 10):
                        shown = collected
                        say(f"environment: {collected} of about {total} fetched, {time.time() - started:.0f} s")
                elif line.startswith("Installing collected packages"):
                    say(f"environment: unpacking, {time.time() - started:.0f} s")
            code = pip.wait()
        except BaseException:
            pip.terminate()
            pip.wait()
            raise
    if code != 0:
        errors = [line for line in last_lines if "ERROR" in line] or list(last_lines)
        raise InstallError(
            "pip could not install {}: {} (all of it: {})".format(
                lock, " ".join(errors[-1:]) or "no message", venv / "install.log"
            )
        )
    say(f"environment: {lock} installed in {time.time() - started:.0f} s")


@contextlib.contextmanager
def only_one(venv):  # type: (Path) -> object
    """Hold the environment against a second run of this script; the hold ends with the process."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(str(venv.parent), os.O_RDONLY)  # a folder can be locked: no lock file to leave behind
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"environment: another run is installing into {venv}; waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def bring_up_to_date(venv, locks):  # type: (Path, list) -> bool
    """Make ``venv`` hold ``locks``; returns whether there was anything to do."""
    wanted = {}
    for lock in locks:
        if not lock.is_file():
            raise InstallError(f"{lock} is missing, expected a lock file: `make lock` makes it")
        wanted[lock.name] = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp = read_stamp(venv)
    if all(stamp.get(name) == value for name, value in wanted.items()):
        return False
    check_platform()
    with only_one(venv):
        stamp = read_stamp(venv)  # the run that was waited for may have done it all
        if any(_EXCLUSIVE.get(name) in stamp for name in wanted):
            say(f"environment: {venv} holds the other paddlepaddle; making it anew")
            stamp = {}
        if not stamp:
            make_venv(find_python(), venv)
        for lock in locks:
            if stamp.get(lock.name) != wanted[lock.name]:
                stamp.pop(lock.name, None)
                write_stamp(venv, dict(stamp, unfinished=lock.name))
                install(venv, lock)
                stamp[lock.name] = wanted[lock.name]
                stamp.pop("unfinished", None)
                write_stamp(venv, stamp)
    return True


def main(argv=None):  # type: (list) -> int
    """Parse the flags, make the environment, say in one line what is wrong if it cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("locks", nargs="+", type=Path, help="lock files, in the order in which they are installed")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="the environment (default: .venv)")
    arguments = parser.parse_args(argv)
    try:
        bring_up_to_date(arguments.venv, arguments.locks)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the next run continues the installation", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: cannot write {error.filename or arguments.venv}: {error.strerror}; choose another place or "
            "free it, then run again",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
