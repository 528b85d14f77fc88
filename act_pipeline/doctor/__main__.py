"""``python -m act_pipeline.doctor``."""

from __future__ import annotations

import sys

from act_pipeline.core.errors import run_command
from act_pipeline.doctor.command import main

if __name__ == "__main__":
    sys.argv[0] = "python -m act_pipeline.doctor"  # argparse names the program after it
    sys.exit(run_command(main))
