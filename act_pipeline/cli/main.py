"""The command ``act-pipeline``: finds the command that is asked for, and imports no other."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from act_pipeline.core.errors import UserError, run_command, suggest
from act_pipeline.core.interruption import ended_by_signals
from act_pipeline.core.version import __version__

PROGRAM = "act-pipeline"
# Command -> the module with its `main`, and what it is for.
COMMANDS = {
    "export": ("act_pipeline.cli.export", "a trained RT-DETR as a static graph"),
    "import": ("act_pipeline.cli.import_model", "an ONNX file of any detector as a float model"),
    "compress": ("act_pipeline.cli.compress", "a static graph to INT8, by calibration, SmoothQuant or training"),
    "eval": ("act_pipeline.cli.eval", "mAP and latency in an inference engine, or one picture"),
    "analyze": ("act_pipeline.cli.analyze", "a float model before compression: distributions, sensitivity to INT8"),
    "benchmark": ("act_pipeline.cli.benchmark", "all engines and precisions of this machine, side by side"),
    "search": ("act_pipeline.cli.search", "a faster variant without training: fewer decoder layers, fewer queries"),
    "report": (
        "act_pipeline.cli.report",
        "report.html of an INT8 model: what it gains and loses, compared with FP32",
    ),
    "onnx": ("act_pipeline.cli.onnx", "a model as an ONNX file, for OpenVINO, ONNX Runtime or TensorRT"),
    "engine": ("act_pipeline.cli.engine", "a TensorRT engine of a model"),
    "bundle": ("act_pipeline.cli.bundle", "a model with everything that its target machine needs, in one file"),
    "placement": ("act_pipeline.cli.placement", "which ops TensorRT computes sooner in FP16, timed on its machine"),
    "triton-repository": (
        "act_pipeline.cli.triton_repository",
        "a model as a repository for Triton Inference Server and OpenVINO Model Server",
    ),
    "promote": (
        "act_pipeline.cli.promote",
        "an INT8 model into a repository of versions, with a share of the requests",
    ),
    "rollback": ("act_pipeline.cli.rollback", "the version before, in a repository of versions"),
    "history": ("act_pipeline.cli.history", "what happened to the versions of a repository, and why"),
    "serve": ("act_pipeline.cli.serve", "the versions of a repository, by Triton, with a page and metrics"),
    "doctor": ("act_pipeline.doctor.command", "what is installed, what this machine has, which engines run here"),
    "demo": ("act_pipeline.cli.demo", "the whole path on the built-in sample"),
    "make-sample": ("act_pipeline.cli.make_sample", "the built-in sample's pictures and annotations"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``act-pipeline COMMAND ...``.

    Args:
        argv: the command and its flags; None: those of the process.

    Returns:
        the command's exit code; 2 for a command that there is not, and where ``run_command`` says so; 130 for Ctrl-C,
        143 for SIGTERM.
    """
    return _run(_dispatch, argv)


def run_module(module: str) -> NoReturn:
    """End the process with what a module's ``main`` makes of the command line; for the scripts of the repository."""
    sys.exit(_run(lambda argv: importlib.import_module(module).main(argv)))


def _run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main``: an error that the user can fix, a missing package too, is one line and exit code 2."""

    @functools.wraps(main)
    def with_packages(argv: Sequence[str] | None) -> int:
        try:
            return main(argv)
        except ModuleNotFoundError as error:
            from act_pipeline.doctor.requirements import missing_package

            line = missing_package(error)
            if line is None:
                raise
            raise UserError(line) from None

    return run_command(ended_by_signals(with_packages), argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        found = f"unknown command {name!r}" if name else "no command is given"
        near = suggest(name, COMMANDS) or f", expected one of {', '.join(COMMANDS)}"
        raise UserError(f"{found}{near}; see {PROGRAM} --help")
    before = sys.argv
    sys.argv = [f"{PROGRAM} {name}", *arguments]  # argparse names the program after it
    try:
        return importlib.import_module(COMMANDS[name][0]).main(arguments)
    finally:
        sys.argv = before


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [flags]",
            "",
            "From a trained RT-DETR (PaddleDetection) to an INT8 model that detects as well.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists a command's flags; {PROGRAM} --version tells the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
