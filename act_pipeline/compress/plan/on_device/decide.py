"""Read what ``measure.sh`` wrote, and decide, or write the candidates that are left to be measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from act_pipeline.bundle.measure_script import MACHINE, PROFILE, round_folder
from act_pipeline.compress.plan.on_device.foresight import Recorded
from act_pipeline.compress.plan.on_device.save import Saved, save_placed
from act_pipeline.compress.plan.on_device.study import ALL, FLOAT16, ROUNDS, Study
from act_pipeline.compress.plan.on_device.write import write_step
from act_pipeline.compress.plan.placement import Placement, place
from act_pipeline.compress.plan.placement_cache import key_of
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import require_replaceable
from act_pipeline.core.records import ACT_FILENAME
from act_pipeline.core.tables import text_table
from act_pipeline.engines.tensorrt.trtexec_records import LayerTime, read_compute_ms, read_layer_times
from act_pipeline.onnx_export.export import lowering_hash

_SLOWEST = 3
# What TensorRT calls its own conversions between layouts and types.
_CONVERSION = re.compile(r"reformat|quantizelinear|quantize_scale", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where ``measure.sh`` ran.

    Attributes:
        tensorrt: the version of ``trtexec``, such as ``10.3.0``.
        gpu: the GPU, and the version of its driver where ``nvidia-smi`` tells it.
    """

    tensorrt: str
    gpu: str


@dataclass(frozen=True)
class Outcome:
    """What followed from the records of a device.

    Attributes:
        table: the groups and what each gains, and where the time goes, one line each.
        saved: the model that was written; None: more has to be measured.
        candidates: number of candidates to measure next, 0 if it is decided.
    """

    table: tuple[str, ...]
    saved: Saved | None
    candidates: int = 0


def read_study(
    folder: Path,
    save_dir: Path,
    reader_config: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Decide by the records in a folder, and write the INT8 model of the decision.

    Where the decision needs more measurements, their candidates and a new ``measure.sh`` are written into the folder.

    Args:
        folder: what :func:`act_pipeline.compress.plan.on_device.write.write_study` wrote, with ``results/``.
        save_dir: the folder for the INT8 model.
        reader_config: reader YAML of the data that the model is evaluated on; None: the one that ``act.json`` names.
        say: called with a progress line.

    Raises:
        UserError: records are missing or malformed, a model has changed, or the reader does not fit it.
    """
    study = Study.load(folder)
    require_replaceable(save_dir, ACT_FILENAME, "--save_dir")
    study.require_models()
    machine = _machine(folder, study)
    recorded = Recorded(_answers(folder, study))
    found = place(study.groups, recorded, [FLOAT16])
    table = (*_table(study, found), *_layers(folder, study))
    if recorded.missing:
        if study.of.export != lowering_hash():
            raise UserError(
                f"{folder} was written by another version of this package, so the next candidates would differ from "
                "the others in more than a group; run deploy/placement.py write into another folder"
            )
        study = write_step(study.with_step(recorded.missing), folder, say)
        return Outcome(table, None, len(study.names(len(study.steps))))
    engine = f"TensorRT {machine.tensorrt}"
    return Outcome(table, save_placed(study, found, engine, machine.gpu, save_dir, reader_config, say))


def _machine(folder: Path, study: Study) -> Machine:
    path = folder / MACHINE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: run measure.sh of {folder} on {study.target.device}, then copy results/ back into it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run measure.sh again") from None
    found = re.fullmatch(r"trtexec ([0-9]{4,6})\ngpu (.+)\n", text)
    if found is None:
        raise UserError(f"{path} is {text[:80]!r}, expected 'trtexec NUMBER' and 'gpu NAME'; run measure.sh again")
    number = int(found.group(1))
    # 8502 is 8.5.2, 100300 is 10.3.0, as in NV_TENSORRT_VERSION.
    parts = (number // 10000, number // 100 % 100, number % 100)
    if number < 100000:
        parts = (number // 1000, number // 100 % 10, number % 100)
    version = ".".join(map(str, parts))
    if not f"{version}.".startswith(f"{study.of.tensorrt}."):
        raise UserError(f"{path} is of TensorRT {version}, expected {study.of.tensorrt}; run measure.sh of {folder}")
    return Machine(version, found.group(2))


def _answers(folder: Path, study: Study) -> dict[str, Mapping[str, Sequence[float]]]:
    """Return the answers to the questions of all steps: label -> seconds of each round.

    Raises:
        UserError: a round is missing, or a record is malformed.
    """
    answers: dict[str, Mapping[str, Sequence[float]]] = {}
    for step, questions in enumerate(study.steps, 1):
        folders = [folder / round_folder(step, number) for number in range(1, ROUNDS + 1)]
        done = sum(each.is_dir() for each in folders)
        if done < ROUNDS:
            raise UserError(
                f"{folders[0].parent} has {done} of {ROUNDS} rounds: run measure.sh of {folder} on "
                f"{study.target.device} to its end, then copy results/ back into it"
            )
        seconds = {
            name: [read_compute_ms(each / f"{name}.json") / 1000 for each in folders] for name in study.names(step)
        }
        for asked in questions:
            answers[key_of(study.question(asked))] = {label: seconds[name] for label, name in asked.items()}
    return answers


def _table(study: Study, found: Placement) -> list[str]:
    reverted = {group.name for group in found.reverted}
    rows = [
        [group.name, str(len(group.ops)), f"{found.gains[group.name]:+.1%}", "float" if group.name in reverted else ""]
        for group in study.groups
    ]
    return text_table(["group", "ops", "faster with it in float", "placed"], rows).splitlines()


def _layers(folder: Path, study: Study) -> list[str]:
    """Return where the time goes in the engines whose layers were timed."""
    lines = []
    for name in study.candidates:
        path = folder / PROFILE.format(name=name)
        if path.is_file():
            lines.append(_profile_line(name, read_layer_times(path)))
    return lines


def _profile_line(name: str, layers: Sequence[LayerTime]) -> str:
    total = sum(layer.ms for layer in layers)
    converting = sum(layer.ms for layer in layers if _CONVERSION.search(layer.name))
    slowest = sorted(layers, key=lambda layer: -layer.ms)[:_SLOWEST]
    named = ", ".join(f"{layer.name[:60]} {layer.ms:.3f}" for layer in slowest)
    what = {ALL: "all in INT8", FLOAT16: "FP16"}.get(name, "as placed")
    share = converting / total if total else 0.0
    return f"layers, {what}: {len(layers)} in {total:.3f} ms, {share:.0%} of it conversions; slowest: {named}"
