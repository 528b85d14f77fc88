"""Time and evaluate one model in all engines and precisions that this machine has, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from act_pipeline.benchmark.plan import MIN_BURSTS, MIN_REPEATS, QUICK_BURSTS, QUICK_REPEATS, BenchmarkRequest
from act_pipeline.benchmark.run import run_benchmark
from act_pipeline.cli.flags import Parser, at_least, device
from act_pipeline.engines import ENGINES, PRECISIONS
from act_pipeline.engines.interface import AUTO_REQUESTS


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    for line in run_benchmark(parse_request(list(sys.argv[1:] if argv is None else argv))).lines:
        print(line)
    return 0


def parse_request(argv: Sequence[str]) -> BenchmarkRequest:
    """Return the request that the flags make.

    Raises:
        UserError: a flag is unknown or its value is not what it takes.
        SystemExit: ``--help``, after printing it.
    """
    namespace = _parser().parse(argv)
    request = BenchmarkRequest(**{entry.name: getattr(namespace, entry.name) for entry in fields(BenchmarkRequest)})
    request.check()
    return request


def _parser() -> Parser:
    parser = Parser(
        description="Time and evaluate one model in all engines and precisions that this machine has, side by side.",
        allow_abbrev=False,
    )

    def flag(name: str, help: str, **options: Any) -> None:
        default = BenchmarkRequest.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", help=help, default=default, **options)

    flag("model_path", "FP32 model folder, or a TensorRT plan (default: the sample's, output/rtdetr_sample)")
    flag("int8_model_path", "INT8 model folder, or a TensorRT plan (default: the sample's, output/rtdetr_sample_int8)")
    flag(
        "model_filename",
        "program in the model folders (default %(default)s, else inference.pdmodel, else the only one)",
    )
    flag("params_filename", "parameters in the model folders (default %(default)s, else as the program)")
    flag("reader_config", "reader YAML: data set and preprocessing (default configs/readers/sample_reader.yml)")
    flag("engines", f"some of {','.join(ENGINES)} (default: all that run here)", type=_names, metavar="NAME,...")
    flag("reference", "the engine int8_reference too, a cross-check in Paddle that nobody deploys", action="store_true")
    flag("precisions", f"some of {','.join(PRECISIONS)} (default: all)", type=_names, metavar="NAME,...")
    flag(
        "device", "CPU, GPU or auto: a GPU if an engine can use one (default %(default)s)",
        type=device, metavar="CPU|GPU|auto",
    )  # fmt: skip
    flag("cpu_threads", "CPU threads (default: all CPUs this process may use)", type=at_least(1), metavar="N")
    flag("batch_size", "images in a run (default %(default)s)", type=at_least(1), metavar="N")
    flag("warmup", "runs of each engine before the first round (default %(default)s)", type=at_least(0), metavar="N")
    flag(
        "repeats",
        f"rounds, in each of which every engine is timed once (default {MIN_REPEATS}, with --throughput {MIN_BURSTS} "
        "a load; no fewer without --quick)",
        type=at_least(1), metavar="N",
    )  # fmt: skip
    flag(
        "quick",
        f"for a look: fewer rounds will do (default then {QUICK_REPEATS}, with --throughput {QUICK_BURSTS})",
        action="store_true",
    )
    flag(
        "throughput",
        "images a second under load, at each of --batches and --requests, with the latency of each; no mAP",
        action="store_true",
    )
    flag(
        "batches", "batch sizes for --throughput (default 1,2,4,8, or the model's if it is fixed)",
        type=_counts, metavar="N,...",
    )  # fmt: skip
    flag(
        "requests",
        "numbers of parallel requests for --throughput, auto for what the runtime recommends (default: some from 1 "
        "to twice the CPU threads; engines that run one at a time: 1)",
        type=_requests,
        metavar="N,...",
    )
    flag(
        "burst_seconds", "with --throughput, how long each engine runs in each round (default %(default)s)",
        type=_seconds, metavar="S",
    )  # fmt: skip
    flag("random", "time on random input, not on the data set's images", action="store_true")
    flag("no_map", "do not evaluate; with --random, no data set is needed", action="store_true")
    flag("limit", "evaluate the first N images of the data set (default: all)", type=at_least(1), metavar="N")
    flag(
        "peer", "one more row, NNCF's INT8 of the FP32 model in OpenVINO: nncf (post-training), nncf_accuracy_control",
        metavar="NAME",
    )  # fmt: skip
    flag("peer_max_drop", "drop of mAP for nncf_accuracy_control (default %(default)s)", type=float, metavar="DROP")
    flag(
        "peer_images", "images of the train split that the other tool calibrates on (default %(default)s)",
        type=at_least(1), metavar="N",
    )  # fmt: skip
    flag("work_dir", "save the other tool's model in this folder (default: it is deleted)", metavar="DIR")
    flag("seed", "of the order of the engines within the rounds (default %(default)s)", type=int, metavar="N")
    flag("json", "write the record (benchmark.json) to this file", metavar="FILE")
    flag("chart", "draw a bar chart into this file", metavar="FILE.png")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names with commas between them")
    return names


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected whole numbers of at least 1, such as 1,2,4")
    return counts


def _requests(text: str) -> tuple[int, ...]:
    parts = [part.strip().lower() for part in text.split(",")]
    counts = _counts(",".join(part for part in parts if part != "auto")) if set(parts) != {"auto"} else ()
    return (*counts, AUTO_REQUESTS) if "auto" in parts else counts


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of seconds above 0, such as 2")
    return value
