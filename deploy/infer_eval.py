"""Evaluate, time or show a model in an inference engine; the flags are those of PaddleSlim's detection example."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Sequence  # noqa: E402

from act_pipeline.cli.eval_flags import parse_request  # noqa: E402
from act_pipeline.core.errors import run_command  # noqa: E402
from act_pipeline.inference import run_inference  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    outcome = run_inference(parse_request(arguments), rerun=[sys.executable, __file__, *arguments])
    for line in outcome.lines:
        print(line)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(run_command(main))
