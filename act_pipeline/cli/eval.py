"""Evaluate, time or show a model in an inference engine; the flags are those of PaddleSlim's detection example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from act_pipeline.cli.flags import Parser, at_least, device, parse_bool
from act_pipeline.core.errors import suggest
from act_pipeline.core.process_pool import EXECUTORS
from act_pipeline.engines import ENGINES, PRECISIONS
from act_pipeline.inference.engine_selection import ALL, AUTO
from act_pipeline.inference.request import HINTS, InferenceRequest
from act_pipeline.inference.run import run_inference


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    again = [sys.executable, "-m", "act_pipeline.cli.main", "eval", *arguments]
    outcome = run_inference(parse_request(arguments), rerun=again)
    for line in outcome.lines:
        print(line)
    return outcome.exit_code


def parse_request(argv: Sequence[str]) -> InferenceRequest:
    """Return the request that the flags make.

    Raises:
        UserError: a flag is unknown or its value is not what it takes.
        SystemExit: ``--help``, after printing it.
    """
    namespace = _parser().parse(argv)
    return InferenceRequest(**{entry.name: getattr(namespace, entry.name) for entry in fields(InferenceRequest)})


def _parser() -> Parser:
    parser = Parser(
        description="Run a model on a COCO data set (mAP, latency) or on one picture, in an inference engine.",
        allow_abbrev=False,
    )

    def flag(name: str, help: str, **options: Any) -> None:
        parser.add_argument(
            f"--{name}", help=help, default=InferenceRequest.__dataclass_fields__[name].default, **options
        )

    def boolean(name: str, help: str) -> None:
        default = InferenceRequest.__dataclass_fields__[name].default
        flag(name, f"{help} (default {default})", type=parse_bool, nargs="?", const=True, metavar="True|False")

    flag(
        "model_path",
        "model folder, an ONNX file of deploy/export_onnx.py, or a TensorRT plan (.plan, .engine) "
        "(default: the sample's, output/rtdetr_sample_int8, or output/rtdetr_sample with a float --precision)",
    )
    flag(
        "model_filename", "program in the model folder (default %(default)s, else inference.pdmodel, else the only one)"
    )
    flag("params_filename", "parameters in the model folder (default %(default)s, else as the program)")
    flag("reader_config", "reader YAML: data set and preprocessing (default configs/readers/sample_reader.yml)")
    flag("image_file", "run on this picture, list what is found and draw it, instead of evaluating")
    flag(
        "engine",
        "what runs the model; auto: the fastest that this machine has for the precision, on a CPU openvino; all: "
        "mAP and latency in every engine of this machine, next to those of the float model. openvino, "
        "onnxruntime and tensorrt export a model folder to ONNX and save the file in it (default: paddle, or the "
        "engine of --use_trt or --use_mkldnn; auto for an ONNX file)",
        type=_engine,
        metavar="|".join((AUTO, ALL, *ENGINES)),
    )
    flag(
        "device",
        "CPU, GPU or auto: a GPU if the engine can use one (default %(default)s)",
        type=device,
        metavar="CPU|GPU|auto",
    )
    names = "|".join(PRECISIONS)
    flag("precision", f"{names} (default: what the model is)", type=_precision, metavar=names)
    boolean("use_trt", "--engine=paddle_trt: Paddle with TensorRT; the first run collects shapes and builds the engine")
    boolean("use_dynamic_shape", "give TensorRT the shapes collected in dynamic_shape.txt")
    boolean(
        "use_mkldnn",
        "--engine=paddle_onednn: Paddle with oneDNN on the CPU. For int8: True runs the convolutions in INT8 and skips "
        "the other Q/DQ, about as fast as fp32; False computes every Q/DQ in float, exact and slow",
    )
    flag(
        "cpu_threads",
        "CPU threads, with --shards of each process (default: all CPUs this process may use, shared by the "
        "shards; with "
        "--executor=ray 1)",
        type=at_least(1),
        metavar="N",
    )
    boolean(
        "benchmark", "measure latency only, on images (or --image_file) read beforehand: 5 runs to warm up, 50 timed"
    )
    boolean(
        "include_nms",
        "accepted for PaddleSlim's command lines and ignored: the model's outputs decide whether NMS is left to do",
    )
    boolean(
        "trt_calib_mode",
        "TensorRT calibrates INT8 scales itself, for a float model with --precision=int8 --use_trt=True",
    )
    flag("img_shape", "network input, one number or HEIGHT,WIDTH (default: the reader's)", type=_size, metavar="SIZE")
    flag("batch_size", "images in a run (default %(default)s)", type=at_least(1), metavar="N")
    flag(
        "hint",
        "latency: one run at a time on all CPU threads; throughput: as many parallel requests as the runtime "
        "recommends, where the engine has requests (default %(default)s)",
        type=_hint,
        metavar="|".join(HINTS),
    )
    flag(
        "shards",
        "evaluate in N parallel processes: the same mAP sooner, but with latencies under the load of the others "
        "(default: 1; with --executor=ray as many as the cluster has room for)",
        type=at_least(1),
        metavar="N",
    )
    flag(
        "executor",
        "where the shards are: local, on this machine, or ray, on a cluster that has the model and the images "
        "under the "
        "same paths (default %(default)s)",
        type=_executor,
        metavar="|".join(EXECUTORS),
    )
    flag("ray_address", "of the cluster, for --executor=ray: auto, HOST:PORT or ray://HOST:PORT", metavar="ADDRESS")
    flag("limit", "only the first N images of the data set", type=at_least(1), metavar="N")
    flag(
        "threshold",
        "smallest score that --image_file draws and lists (default %(default)s)",
        type=_share,
        metavar="SCORE",
    )
    flag("output_dir", "where --image_file writes the picture (default %(default)s)")
    flag("json", "write the record (eval.json) to this file", metavar="FILE")
    boolean("collect_shape_only", "collect dynamic_shape.txt into the model folder and stop; works on a CPU")
    return parser


def _precision(text: str) -> str:
    return _one_of(text, PRECISIONS)


def _engine(text: str) -> str:
    return _one_of(text, (AUTO, ALL, *ENGINES))


def _hint(text: str) -> str:
    return _one_of(text, HINTS)


def _executor(text: str) -> str:
    return _one_of(text, EXECUTORS)


def _one_of(text: str, names: Sequence[str]) -> str:
    if text.lower() in names:
        return text.lower()
    near = suggest(text.lower(), names)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected one of {', '.join(names)}{near}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 to 1")
    return value


def _size(text: str) -> tuple[int, int]:
    parts = text.replace("x", ",").split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 640 or HEIGHT,WIDTH such as 480,640")
    return numbers[0], numbers[-1]
