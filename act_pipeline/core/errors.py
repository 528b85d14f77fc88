"""Errors that the user can resolve (one line, no traceback) and the exit codes of commands."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Sequence

from act_pipeline.core.command_names import name_commands
from act_pipeline.core.progress import end_bars

EXIT_USER_ERROR = 2
EXIT_BELOW_FLOOR = 3
EXIT_UNDECIDED = 4
EXIT_INTERRUPTED = 130

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EEXIST: "a file is there, expected a folder",
    errno.ENOTDIR: "a file is there, expected a folder",
    errno.ELOOP: "the links lead in a circle",
    errno.EISDIR: "a folder is there, expected a file",
    errno.ESTALE: "the network disk does not answer",
    errno.ENOTCONN: "the network disk does not answer",
}


class UserError(Exception):
    """An error that the user can resolve: what was found, what was expected and what to do, in one line."""

    exit_code = EXIT_USER_ERROR

    def __str__(self) -> str:
        # Text quoted from a file may contain line breaks.
        return " ".join(super().__str__().split())


class BelowFloor(UserError):
    """No INT8 model is within ``Strategy.max_drop`` and has ``Strategy.min_agreement``."""

    exit_code = EXIT_BELOW_FLOOR


class Interrupted(KeyboardInterrupt):
    """A signal interrupted the run; the message names what is saved and how to resume.

    Attributes:
        signum: number of the signal; the exit code is 128 more (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the candidate most similar to ``name``; empty if none is similar."""
    near = difflib.get_close_matches(str(name), [str(candidate) for candidate in candidates], n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def describe_os_error(error: OSError) -> str | None:
    """Return a message for an ``OSError`` that the user can resolve; None if it may be a bug."""
    reason = _DISK_ERRORS.get(error.errno or 0)
    if "No usable temporary directory" in str(error):
        return "there is no temporary folder to write to (/tmp is read-only or full); set TMPDIR to one, then run again"
    if reason is None:
        return None
    place = error.filename if error.filename else "the output"
    return f"cannot write or read {place}: {reason}; choose another place or free it, then run again"


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main``, and print errors that the user can resolve as one line on stderr.

    Args:
        main: takes the argument list (None: ``sys.argv[1:]``) and returns an exit code.
        argv: the arguments.

    Returns:
        The exit code of ``main``; 2 for a :class:`UserError`, a full disk or a path without permission; 3 for
        :class:`BelowFloor`; 130 for Ctrl-C; 128 + the signal for :class:`Interrupted`.

    Raises:
        Exception: any other exception of ``main``, which is a bug.
    """
    try:
        return main(argv)
    except UserError as error:
        message, exit_code = str(error), error.exit_code
    except KeyboardInterrupt as error:
        # Paddle's translation of layers puts its own traceback into the message of any other.
        told = str(error) if isinstance(error, Interrupted) else ""
        _say(f"interrupted: {told or 'nothing half-written is left behind'}")
        return error.exit_code if isinstance(error, Interrupted) else EXIT_INTERRUPTED
    except OSError as error:
        described = describe_os_error(error)
        if described is None:
            raise
        message, exit_code = described, EXIT_USER_ERROR
    _say(f"error: {name_commands(message)}")
    return exit_code


def _say(line: str) -> None:
    """Print a last line on stderr, without the progress bars of the loops that it ends."""
    end_bars()
    print(line, file=sys.stderr)
