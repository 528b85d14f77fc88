"""From a model folder of Paddle 3 to a float `InferenceModel`, compared with what Paddle 3 computes."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from act_pipeline.core.artifacts import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.output_folders import new_artifact, require_replaceable
from act_pipeline.core.records import read_record, write_record
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers.import_model import IMPORT_SCHEMA, RECORD_FILENAME, ImportedModel, import_onnx
from act_pipeline.importers.onnx.convert import IMAGE
from act_pipeline.importers.onnx.pictures import Pictures, preparation_of
from act_pipeline.importers.onnx.read import require_importers
from act_pipeline.importers.onnx.verify import TOLERANCE, compare, state_difference
from act_pipeline.importers.paddle3.environment import Paddle3, find_paddle3
from act_pipeline.importers.paddle3.folder import Paddle3Folder, open_input_size

OPSET = 17
_SCRIPT = Path(__file__).with_name("paddle3_process.py")
_SEED = 20
# Lines of the other process that are no reason of a failure.
_NOISE = re.compile(r"^\s*$|^\s{2,}|UserWarning|^\[Paddle2ONNX\] (Start|Use opset)|^Traceback|^[-=]+$")
_REASONS = (r"Failed to convert PaddlePaddle model: (.*)", r"\[Paddle2ONNX\]\s*(.*)", r"^(\w*(?:Error|Exception)\b.*)")


def import_paddle3(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    python: str | os.PathLike[str] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    images: str | os.PathLike[str] | None = None,
    fixed_batch: bool = False,
) -> ImportedModel:
    """Import a model of Paddle 3 or PaddleX 3: through ONNX, in a process with Paddle 3, and compare it with both.

    Args:
        folder: has ``inference.json`` (or ``model.json``), its ``.pdiparams``, and ``inference.yml`` (or
            ``infer_cfg.yml``), from which preprocessing and class names are taken; or the ``.json`` file.
        output: the folder to write; None: ``output_inference/<name of the folder>``.
        python: a Python with paddlepaddle 3.0 to 3.2 and paddle2onnx 2; None: an environment in the user's cache, made
            at the first call.
        input_shape, images, fixed_batch: as for :func:`act_pipeline.importers.import_onnx`. An input size that the
            program leaves open is taken from ``Resize`` of the preprocessing.

    Returns:
        The model, with the difference to Paddle 3.

    Raises:
        UserError: the folder is not as it must be, the environment cannot be made, paddle2onnx or the importer cannot
            convert the model, or its results differ from those of Paddle 3.
    """
    require_importers()
    source = Paddle3Folder.find(Path(folder))
    directory = Path(output) if output is not None else Path("output_inference") / source.directory.resolve().name
    infer_cfg = source.infer_cfg()
    pictures = Pictures.of(None if images is None else Path(images))
    require_replaceable(directory, RECORD_FILENAME, "--output")
    paddle3 = find_paddle3(python)
    with tempfile.TemporaryDirectory(prefix="act_pipeline_paddle3_") as name:
        work = Path(name)
        exported = work / f"{source.program.stem}.onnx"
        _in_paddle3(paddle3, source, "be exported to ONNX", "export", exported, OPSET)
        if not exported.is_file():
            raise UserError(
                f"{source.program} cannot be exported to ONNX: paddle2onnx {paddle3.paddle2onnx} wrote no file"
            )
        try:
            imported = import_onnx(
                exported,
                work / "imported",
                input_shape=input_shape or _size_from(infer_cfg),
                images=images,
                fixed_batch=fixed_batch,
            )
        except UserError as error:
            raise UserError(str(error).replace(str(exported), f"{source.program} (as ONNX)")) from None
        difference = _difference(paddle3, source, imported, work, pictures)
        with new_artifact(directory) as staging:
            shutil.copytree(imported.model.directory, staging, dirs_exist_ok=True)
            text = yaml.safe_dump(infer_cfg, sort_keys=False, allow_unicode=True)
            (staging / INFER_CFG_FILENAME).write_text(text, encoding="utf-8")
            record = read_record(staging / RECORD_FILENAME, IMPORT_SCHEMA)
            record.update(
                source=source.program.name,
                source_hash=hash_files([source.program, source.parameters]),
                paddle3_difference=difference,
            )
            record["versions"].update(paddlepaddle3=paddle3.paddle, paddle2onnx=paddle3.paddle2onnx)
            write_record(staging / RECORD_FILENAME, IMPORT_SCHEMA, record)
    return dataclasses.replace(imported, model=InferenceModel.load(directory), paddle3_difference=difference)


def _size_from(infer_cfg: Mapping[str, Any]) -> dict[str, Sequence[int]] | None:
    size = open_input_size(infer_cfg)
    return None if size is None else {"": (1, 3, *size)}


def _in_paddle3(paddle3: Paddle3, source: Paddle3Folder, purpose: str, action: str, *arguments: Any) -> None:
    """Run a step in a process with Paddle 3.

    Raises:
        UserError: it fails, with the reason in one line.
    """
    command = [paddle3.python, "-I", _SCRIPT, action, source.program, source.parameters, *arguments]
    done = subprocess.run(
        [str(each) for each in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise UserError(
            f"{source.program} cannot {purpose} with paddlepaddle {paddle3.paddle} and paddle2onnx "
            f"{paddle3.paddle2onnx}: {failure_reason(done.stdout, done.returncode)}"
        )


def failure_reason(output: str, code: int) -> str:
    """Return in one line why a process failed.

    Args:
        output: what it wrote.
        code: its exit code; negative for a signal.
    """
    lines = [line.strip() for line in output.splitlines() if not _NOISE.search(line)]
    ended = f"the process ended with {code}"
    if code < 0:
        known = {each.value: each.name for each in signal.Signals}
        ended = f"the process crashed ({known.get(-code, f'signal {-code}')})"
    for pattern in _REASONS:
        matches = [re.search(pattern, line) for line in lines]
        found = [match[1].strip() for match in matches if match and match[1].strip()]
        if found:
            return f"{found[-1][:300]} ({ended})"
    return f"{lines[-1][:300]} ({ended})" if lines else ended


def _difference(
    paddle3: Paddle3, source: Paddle3Folder, imported: ImportedModel, work: Path, pictures: Pictures
) -> float:
    """Return the largest difference of the imported model to Paddle 3 on one picture.

    Raises:
        UserError: Paddle 3 cannot run its model, or the difference is above the tolerance.
    """
    names = {
        entry["onnx_name"]: known
        for known, entry in read_record(imported.model.directory / RECORD_FILENAME, IMPORT_SCHEMA)["inputs"].items()
    }
    sample = {name: _values(known, imported, pictures) for name, known in names.items()}
    np.savez(work / "inputs.npz", **sample)
    _in_paddle3(paddle3, source, "be run", "run", work / "inputs.npz", work / "outputs.npz")
    with np.load(work / "outputs.npz") as arrays:
        expected = [arrays[str(index)] for index in range(len(arrays.files))]
    with static_mode():
        graph = StaticGraph.load(imported.model)
        try:
            import paddle

            feed = {known: sample[name] for name, known in names.items()}
            with paddle.static.scope_guard(graph.scope):
                found = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
        finally:
            graph.close()
    difference = compare(expected, [np.asarray(each) for each in found])
    if not difference <= TOLERANCE:
        raise UserError(
            f"{source.program}: what was imported differs from Paddle {paddle3.paddle} by "
            f"{state_difference(difference)}, expected at most {TOLERANCE:g}"
        )
    return difference


def _values(name: str, imported: ImportedModel, pictures: Pictures) -> np.ndarray:
    """Return values for an input of a detector: an image, its size, or its scale."""
    sizes = [1 if size < 0 else size for size in imported.inputs[name]]
    if name == "im_shape":
        height_width = next((each[2:] for each in imported.inputs.values() if len(each) == 4), (640, 640))
        return np.broadcast_to(np.array(height_width, np.float32), sizes).copy()
    if name == "scale_factor":
        return np.ones(sizes, np.float32)
    if name == IMAGE:
        picture = preparation_of(imported.family)(pictures.take(0, max(sizes[2:])), sizes[2:])
        return np.broadcast_to(picture, sizes).copy()
    return np.random.default_rng(_SEED).random(sizes, np.float32)
