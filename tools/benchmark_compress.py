"""Time a training by stock PaddleSlim and by this package side by side: seconds by stage, and their ratio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from act_pipeline.errors import run_command  # noqa: E402
from act_pipeline.flags import add_config, add_opt  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config(
        parser,
        REPOSITORY / "configs" / "sample_qat_dis.yml",
        "a config with Distillation, QuantAware and TrainConfig",
    )
    add_opt(parser, "set keys of the config: Global.model_dir=output/my_rtdetr")
    parser.add_argument("--train_iter", type=int, default=50, help="iterations of training; default: %(default)s")
    parser.add_argument("--eval_iter", type=int, default=10, help="iterations between evaluations; default: %(default)s")
    parser.add_argument("--eval_images", type=int, default=50, help="images of each evaluation; 0: all; default: %(default)s")
    parser.add_argument("--only", choices=["stock", "ours"], help="one of the two; default: both, stock first")
    parser.add_argument("--json", metavar="FILE", help="write the record there")
    arguments = parser.parse_args(argv)

    from act_pipeline.benchmark.compress_run import COMPRESS_SCHEMA, SIDES, Request, compare
    from act_pipeline.records import write_record
    from act_pipeline.tables import compress_benchmark_table

    request = Request(
        arguments.config, tuple(arguments.opt), arguments.train_iter, arguments.eval_iter, arguments.eval_images or None
    )
    record = compare(request, (arguments.only,) if arguments.only else SIDES)
    if arguments.json:
        write_record(arguments.json, COMPRESS_SCHEMA, record)
    print(compress_benchmark_table(record))
    return 1 if any(row["failure"] for row in record["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
