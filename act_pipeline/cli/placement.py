"""Find which ops of an INT8 model TensorRT computes sooner in FP16 on its target machine, by trtexec there.

`write` makes a folder with the candidates as ONNX files and measure.sh, which times them on the target machine. `read`
decides by what it wrote there; its exit code is 4 where measure.sh has to run once more before it can decide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from act_pipeline.cli.flags import Parser, at_least
from act_pipeline.core.command_names import name_commands
from act_pipeline.core.errors import EXIT_UNDECIDED


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True, metavar="write|read")
    write = steps.add_parser("write", help="the candidates and measure.sh", description="Write the candidates.")
    write.add_argument("--model_path", required=True, help="the INT8 model's folder, with its act.json")
    write.add_argument("--model_filename", default="model.pdmodel")
    write.add_argument("--params_filename", default="model.pdiparams")
    write.add_argument("--float_model_path", help="the float model's folder; default: the one that act.json names")
    write.add_argument("--target", required=True, help="t4, a10, orin or xavier")
    write.add_argument("--tensorrt", help="version of TensorRT there: 8.5, 8.6, 10 or 11 (default: its usual one)")
    write.add_argument(
        "--batch", type=at_least(1), metavar="N", help="the largest batch, which is timed (default: the target's)"
    )
    write.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write")
    read = steps.add_parser("read", help="the decision and its INT8 model", description="Decide by what was measured.")
    read.add_argument("folder", metavar="FOLDER", help="what write made, with results/ of measure.sh")
    read.add_argument("--save_dir", required=True, help="folder for the INT8 model of the decision")
    read.add_argument("--reader_config", help="reader of the compression; default: the one that act.json names")
    arguments = parser.parse(argv)
    return _write(arguments) if arguments.step == "write" else _read(arguments)


def _write(arguments: object) -> int:
    from act_pipeline.compress.plan.on_device import StudyRequest, write_study

    given = {name: value for name, value in vars(arguments).items() if name != "step"}
    study, before = write_study(StudyRequest(**given), _say)
    folder = given["output"]
    if before:
        print(f"{folder} has the candidates of these ops: what was measured there holds for this model too")
    else:
        print(f"{len(study.candidates)} candidates of {len(study.groups)} groups of ops: {folder}")
    print(_there(folder, study.target.device, f"{Path(given['model_path'])}_{given['target']}"))
    return 0


def _read(arguments: object) -> int:
    from act_pipeline.compress.plan.on_device import read_study
    from act_pipeline.compress.result.summary import placement_lines

    given = vars(arguments)
    folder, save_dir = Path(given["folder"]), Path(given["save_dir"])
    outcome = read_study(folder, save_dir, given["reader_config"], _say)
    for line in outcome.table:
        print(line)
    if outcome.saved is None:
        print(
            f"not decided yet: ops gain by themselves, so that {outcome.candidates} models have to be timed in turns; "
            "engines that are built there are used again"
        )
        print(_there(str(folder), "the same machine", str(save_dir)))
        return EXIT_UNDECIDED
    act, why = outcome.saved.act, outcome.saved.unevaluated
    assert act.placement is not None
    for line in placement_lines(act.placement):
        print(line)
    if act.map_drop is not None:
        print(f"mAP {act.int8.map:.4f}, {0.0 - act.map_drop:+.4f} against the float model")
    if why is not None:
        known = f"its accuracy is not known ({why}): evaluate it with deploy/infer_eval.py before you ship it"
        print(name_commands(known))
    print(f"INT8 model, act.json: {save_dir}")
    return 0


def _there(folder: str, machine: str, save_dir: str) -> str:
    return name_commands(
        f"next: copy {folder} to {machine}, run ./measure.sh in it, copy its results/ back into {folder}, then: "
        f"deploy/placement.py read {folder} --save_dir {save_dir}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)
