"""Compress a detector to INT8: by calibration, SmoothQuant or training (PaddleSlim's ACT), as Strategy.name says.

By default (`auto`) the cheapest way that keeps the mAP within Strategy.max_drop; exit code 3 if there is none. With
Strategy.search=true, a faster variant of the model is searched for afterwards, as a second result in <save_dir>.search.
Several GPUs or hosts train together under `python -m paddle.distributed.launch tools/compress.py ...`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from act_pipeline.cli.flags import Parser, add_config, add_devices, add_opt, load_config_of

if TYPE_CHECKING:
    from act_pipeline.compress.qat.distributed.ranks import Ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    add_config(
        parser,
        "config in PaddleSlim's schema (Global, Strategy, quantize, QuantPost, SmoothQuant, Distillation, QuantAware, "
        "TrainConfig)",
        "--config_path",
    )
    parser.add_argument(
        "--save_dir", default="output/rtdetr_sample_int8", help="folder of the INT8 model; default: %(default)s"
    )
    add_devices(parser, "where to train or calibrate")
    add_opt(parser, "set keys of the config: TrainConfig.train_iter=100 Global.model_dir=output/my_rtdetr")
    parser.add_argument(
        "-r",
        "--resume",
        action="store_true",
        help="resume an interrupted run, from its checkpoint next to --save_dir, to the same result",
    )
    parser.add_argument(
        "--lang",
        default="en",
        choices=["en", "zh", "none"],
        help="language of report.html in the model's folder; none: no report; default: %(default)s",
    )
    arguments = parser.parse(argv)

    from act_pipeline.compress.qat.distributed.launch import join

    return join().run(lambda ranks: _compress(arguments, ranks))


def _compress(arguments: argparse.Namespace, ranks: Ranks) -> int:
    from act_pipeline.compress import compress
    from act_pipeline.compress.qat.distributed.remote_training import follow
    from act_pipeline.compress.result.summary import compression_table

    config = load_config_of(arguments, announce=ranks.leads)
    if not ranks.leads:
        follow(config, arguments.devices, ranks)
    if config.strategy.search:
        from act_pipeline.search.second_result import check_search, second_result, second_result_lines

        check_search(config, arguments.save_dir)
    report = None if arguments.lang == "none" else arguments.lang
    result = compress(
        config, arguments.save_dir, arguments.devices, resume=arguments.resume, report=report, ranks=ranks
    )
    print(compression_table(result.record))
    print(f"INT8 model, act.json{'' if report is None else ' and report.html'}: {result.model.directory}", flush=True)
    if config.strategy.search:
        outcome = second_result(config, result, arguments.devices, report=report)
        for line in second_result_lines(outcome, config):
            print(line)
    return 0
