"""Run targets for so many minutes each: ``python -m tests.fuzz config annotations --minutes 10``; ``all`` runs all.

A finding ends the run with the exit code 1, the smallest example that Hypothesis found for it and its traceback. Each
round of 200 examples starts from a seed that is printed on a finding; ``--seed`` repeats it.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import act_pipeline  # noqa: E402, F401  (before paddle)
from tests.fuzz.harness import Target, check  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

_ROUND = 200
# Beyond what the process has when it starts: an example that needs more is a finding.
_MEMORY_BYTES = 3 << 30


class _OutOfTime(BaseException):
    """The minutes are over. No `Exception`: Hypothesis would take it for a finding."""


def run_target(target: Target, minutes: float, seed: int | None = None) -> tuple[int, Counter[str]]:
    """Read examples until the time is over; returns how many, and what came of them.

    Raises:
        Exception: of the smallest example that fails.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        examples = target.examples(Path(name))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            os.chdir(name)
            number = random.randrange(2**32) if seed is None else seed

            @seeded(number)
            @settings(
                max_examples=_ROUND,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )
            @given(examples)
            def read(example: object) -> None:
                if time.monotonic() > end:
                    raise _OutOfTime
                counts[check(target, Path(name), example)] += 1

            try:
                read()
            except _OutOfTime:
                break
            except Exception:
                print(f"{target.name}: seed {number}", file=sys.stderr)
                raise
            finally:
                os.chdir(ROOT)
            if seed is not None:
                break
    return sum(counts.values()), counts


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="+", choices=[*TARGETS, "all"], metavar="TARGET", help=", ".join([*TARGETS, "all"])
    )
    parser.add_argument("--minutes", type=float, default=10, help="for each target (10)")
    parser.add_argument("--seed", type=int, help="one round, of this seed")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    names = list(TARGETS) if "all" in arguments.targets else arguments.targets
    for name in names:
        start = time.monotonic()
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (virtual + _MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            count, counts = run_target(TARGETS[name], arguments.minutes, arguments.seed)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            print(f"{name}: a finding after {(time.monotonic() - start) / 60:.1f} minutes")
            return 1
        said = ", ".join(f"{what} {number}" for what, number in counts.most_common())
        print(
            f"{name}: {(time.monotonic() - start) / 60:.1f} minutes, {count} examples ({said}), no finding", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
