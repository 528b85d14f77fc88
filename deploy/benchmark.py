"""Time and evaluate one model in all engines and precisions that this machine has, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from act_pipeline.core.errors import run_command  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    # Imported here: every engine's process imports this file, and its memory is to be the engine's own.
    from act_pipeline.benchmark.run import run_benchmark
    from act_pipeline.cli.benchmark_flags import parse_request

    for line in run_benchmark(parse_request(list(sys.argv[1:] if argv is None else argv))).lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
