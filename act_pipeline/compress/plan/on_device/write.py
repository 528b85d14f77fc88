"""Write the candidates of a placement as ONNX files, and the script that times them on the device."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from act_pipeline.bundle.content import nms_mode, write_onnx
from act_pipeline.bundle.measure_script import CANDIDATES, measure_script
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.plan.on_device.foresight import Recorded
from act_pipeline.compress.plan.on_device.study import (
    ALL,
    FILENAME,
    FLOAT16,
    SCRIPT,
    Circumstances,
    Study,
    candidate_path,
)
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.placement import OpGroup, place
from act_pipeline.compress.plan.placement_groups import group_ops, structure_hash
from act_pipeline.core.artifacts import InferenceModel, OnnxModel, copy_infer_cfg
from act_pipeline.core.atomic_files import write_bytes_atomically, write_text_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import new_artifact, require_replaceable
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
from act_pipeline.engines.tensorrt.build import make_profile
from act_pipeline.engines.tensorrt.targets import (
    RTX,
    Target,
    Version,
    check_precision,
    find_target,
    timing_flags,
    trtexec_flags,
)
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.families.registry import decoder_of
from act_pipeline.graph.folding import fold, save_folded
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.op_types import QUANTIZABLE_OPS
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.onnx_export.export import lowering_hash

Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyRequest:
    """A placement to begin.

    Attributes:
        model_path: folder of the INT8 model, with its ``act.json``.
        target: name of the device.
        output: the folder to write.
        tensorrt: version of TensorRT on the device; None: the usual one.
        batch: the largest batch, which is timed; None: that of the device.
        float_model_path: folder of the float model; None: the one that ``act.json`` names.
        model_filename, params_filename: files in the folder of the INT8 model.
    """

    model_path: str
    target: str
    output: str
    tensorrt: str | None = None
    batch: int | None = None
    float_model_path: str | None = None
    model_filename: str = "model.pdmodel"
    params_filename: str = "model.pdiparams"


def write_study(request: StudyRequest, say: Say = lambda line: None) -> tuple[Study, bool]:
    """Write the candidates of a placement and ``measure.sh`` into a folder.

    If the folder already has those of a model with the same ops, for the same device and version, only the models are
    replaced: what was measured there holds for them too.

    Args:
        request: what to write.
        say: called with a progress line.

    Returns:
        The study, and whether it was there before.

    Raises:
        UserError: the device has no ``trtexec`` or no INT8, the model is not an INT8 model of this package, the float
            model is another one, or the folder holds something else.
    """
    target = find_target(request.target.lower())
    version = _timed_version(target, request.tensorrt)
    output = Path(request.output)
    model = InferenceModel.load(request.model_path, request.model_filename, request.params_filename)
    quantized = inspect_model(model).quantized
    if not quantized:
        raise UserError(f"{model.directory} is a float model, expected the INT8 model of a compression (--model_path)")
    check_precision(target, quantized, str(model.directory))
    act = act_of(model)
    float_model = _float_model(model, act, request.float_model_path)
    groups, structure = _groups(model, float_model)
    of = Circumstances(
        structure, target.name, version.name, request.batch or target.batch, lowering_hash(), not restores_weights(act)
    )
    hashes = (model.content_hash(), float_model.content_hash())
    study = Study(model, float_model, hashes, of, None, tuple(groups), {ALL: (), FLOAT16: None})
    require_replaceable(output, FILENAME, "--output")
    if (output / FILENAME).is_file():
        return _same_again(output, study), True
    asked = Recorded({})
    place(study.groups, asked, [FLOAT16])
    study = study.with_step(asked.missing)
    with new_artifact(output) as staging:
        study = write_step(study, staging, say)
    return study, False


def write_step(study: Study, folder: Path, say: Say) -> Study:
    """Write the candidates of the last step that are not there yet, ``placement.json`` and ``measure.sh``.

    Args:
        study: the study; its models must be there.
        folder: the folder.
        say: called with a progress line.

    Returns:
        The study, with its profile.
    """
    (folder / CANDIDATES).mkdir(exist_ok=True)
    names = study.names(len(study.steps))
    missing = [name for name in names if not candidate_path(folder, name).is_file()]
    with static_mode(), tempfile.TemporaryDirectory(prefix="act-placement-") as work:
        source = weights_of(study, Path(work, "folded"))
        for number, name in enumerate(missing, 1):
            say(f"candidate {number} of {len(missing)}: {describe(study, name)}")
            _write_candidate(study, name, source, Path(work), candidate_path(folder, name))
    onnx_model = OnnxModel(candidate_path(folder, ALL))
    summary = inspect_onnx(onnx_model)
    if any(-1 in shape for shape in summary.inputs.values()):
        found = make_profile(onnx_model, summary, study.of.batch)
        study = replace(study, profile={name: [list(shape) for shape in shapes] for name, shapes in found.items()})
    script = _script(study, folder, names)
    write_text_atomically(folder / SCRIPT, script)
    (folder / SCRIPT).chmod(0o755)
    study.save(folder)
    return study


def describe(study: Study, name: str) -> str:
    """Return what a candidate is, for people."""
    numbers = study.candidates[name]
    if numbers is None:
        return "the float model"
    return " and ".join(study.groups[number].name for number in numbers) + " in float" if numbers else "all in INT8"


def weights_of(study: Study, directory: Path) -> InferenceModel | None:
    """Write the float model that weights are restored from; None: reverted ops keep INT8 weights."""
    return None if study.of.int8_weights else save_folded(fold(study.float_model), directory)


def restores_weights(act: ActRecord) -> bool:
    """Return whether the float model has the weights that were rounded: SmoothQuant and training have changed them."""
    return (act.chosen or "").startswith("ptq:")


def act_of(model: InferenceModel) -> ActRecord:
    """Return the record of an INT8 model.

    Raises:
        UserError: it has none.
    """
    return ActRecord.from_json(read_record(model.directory / ACT_FILENAME, ACT_SCHEMA))


def _timed_version(target: Target, asked: str | None) -> Version:
    version = target.version(asked)
    if version is None or version.name == RTX:
        instead = "; Strategy.placement: measured places Q/DQ for CPUs while it compresses" if version is None else ""
        raise UserError(
            f"--target={target.name} has no trtexec to time candidates with, expected t4, a10, orin or xavier{instead}"
        )
    return version


def _float_model(model: InferenceModel, act: ActRecord, given: str | None) -> InferenceModel:
    places = act.config.get("Global") or {}
    named = given if given is not None else places.get("model_dir")
    if not isinstance(named, str):
        raise UserError(f"{model.directory / ACT_FILENAME} names no float model; give --float_model_path")
    try:
        found = InferenceModel.load(named) if given is not None else InferenceModel.load(
            named, places.get("model_filename") or "model.pdmodel", places.get("params_filename") or "model.pdiparams"
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"the float model: {error}; give --float_model_path") from None
    if act.source_hash != found.content_hash():
        raise UserError(
            f"{found.directory} is not the float model that {model.directory} was made from, expected one with the "
            f"hash {act.source_hash}; give --float_model_path"
        )
    return found


def _groups(model: InferenceModel, float_model: InferenceModel) -> tuple[list[OpGroup], str]:
    """Return the groups of ops that are in INT8, and the hash of the structure."""
    with static_mode():
        inventory = inventory_of(model, QUANTIZABLE_OPS, "")
        in_float = {entry["output"] for entry in (*inventory.kept, *inventory.weight_only)}
        with contextlib.closing(fold(float_model)) as graph:
            ops = [op for op in quantizable_ops(graph, QUANTIZABLE_OPS) if op.name not in in_float]
            groups = group_ops(graph, ops)
            structure = structure_hash(graph, groups)
    if not groups or len(ops) != sum(inventory.quantized.values()):
        raise UserError(
            f"{model.directory} has {sum(inventory.quantized.values())} ops in INT8, and {float_model.directory} "
            f"{len(ops)} of them; give the float model that it was made from with --float_model_path"
        )
    return groups, structure


def _same_again(folder: Path, study: Study) -> Study:
    """Put other models of the same structure into a study that is there."""
    before = Study.load(folder)
    was, now = vars(before.of), vars(study.of)
    differ = [f"{key} {was[key]!r} and not {now[key]!r}" for key in now if was[key] != now[key]]
    if differ:
        raise UserError(
            f"{folder} is a placement of something else ({', '.join(differ)}); choose another --output, or delete it"
        )
    study = replace(before, model=study.model, float_model=study.float_model, hashes=study.hashes)
    study.save(folder)
    return study


def _write_candidate(study: Study, name: str, source: InferenceModel | None, work: Path, path: Path) -> None:
    model = study.model
    variant = study.variant(name)
    if isinstance(variant, str):
        model = study.float_model
    elif variant:
        folder = work / name
        folder.mkdir()
        model = revert_to_float(study.model, variant, folder, source)
        copy_infer_cfg(study.model, folder)
    summary = inspect_model(study.model)
    # As in a bundle: the engine that is timed is the one that is shipped.
    nms = nms_mode(decoder_of(study.model, summary.output_shapes), summary.op_counts, study.version) or "none"
    made = work / f"{name}.onnx"
    write_onnx(model, made, study.target, study.version, study.of.batch, nms)
    write_bytes_atomically(path, made.read_bytes())
    made.unlink()


def _script(study: Study, folder: Path, names: list[str]) -> str:
    step = len(study.steps)
    builds = {
        name: trtexec_flags(
            study.target,
            study.version,
            quantized=inspect_onnx(OnnxModel(candidate_path(folder, name))).quantized,
            profile=study.profile,
        )
        for name in names
    }
    placed = next((asked["placed"] for asked in study.steps[-1] if "placed" in asked), None)
    profiled = dict.fromkeys([ALL, FLOAT16, *([placed] if placed else [])])
    return measure_script(
        study.target,
        study.version,
        builds,
        [study.turns(step)],
        [name for name in profiled if name in builds],
        timing_flags(study.version, study.profile),
        "deploy/placement.py read FOLDER --save_dir MODEL",
    )
