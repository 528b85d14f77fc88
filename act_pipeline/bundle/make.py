"""From a model folder to a bundle: the ONNX file, its description, expected detections, and the device's scripts."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.bundle.build_script import build_script
from act_pipeline.bundle.content import device_model, write_onnx, write_openvino
from act_pipeline.bundle.description import describe, guide
from act_pipeline.bundle.pictures import ENGINE, Expected, expected_detections
from act_pipeline.bundle.spelling import spell_for
from act_pipeline.core.artifacts import InferenceModel, OnnxModel, copy_infer_cfg
from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_file
from act_pipeline.engines import find_support
from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
from act_pipeline.engines.tensorrt.build import make_profile
from act_pipeline.engines.tensorrt.targets import RTX, Target, Version, find_target

MODEL, DLA_MODEL, OPENVINO_MODEL = "model.onnx", "model_dla.onnx", "model.xml"
DEVICE_FILES = Path(__file__).parent / "device"

Say = Callable[[str], None]


@dataclass(frozen=True)
class BundleRequest:
    """What to put into a bundle.

    Attributes:
        model_path: the model's folder.
        target: name of the device, a key of :data:`act_pipeline.engines.tensorrt.targets.TARGETS`.
        output: the ``.tar`` to write.
        tensorrt: version of TensorRT on the device, such as ``10``; None: the usual one.
        batch: the largest batch; None: that of the device.
        reader_config: reader YAML, whose eval split gives the pictures; None: the sample's.
        pictures: picture files instead.
        float_model_path: folder of the float model, for the deep learning accelerator of a Jetson.
        model_filename, params_filename: files in the folders.
    """

    model_path: str
    target: str
    output: str
    tensorrt: str | None = None
    batch: int | None = None
    reader_config: str | None = None
    pictures: tuple[str, ...] = ()
    float_model_path: str | None = None
    model_filename: str = "model.pdmodel"
    params_filename: str = "model.pdiparams"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        path: the ``.tar``.
        description: content of its ``bundle.json``.
        notes: what the user should know, one line each.
    """

    path: Path
    description: dict[str, Any]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Return a description for users, of a few lines."""
        made = self.description
        on = f"TensorRT {made['tensorrt']}" if made["tensorrt"] not in (None, RTX) else made["runtime"]
        lines = [
            f"bundle for {made['device']}: {self.path}, {self.path.stat().st_size / 1e6:.2f} MB",
            f"{made['precision']}{' and fp16' if made['float16'] else ''}, batches of "
            f"{'' if made['fixed_batch'] else 'up to '}{made['batch']}, {on}",
            *self.notes,
            f"there: tar xf {self.path.name} && cd {self.path.stem} && less README.md",
        ]
        return "\n".join(lines)


def make_bundle(request: BundleRequest, say: Say = lambda line: None) -> Bundle:
    """Make a bundle.

    Args:
        request: what to put into it.
        say: called with a progress line.

    Returns:
        The bundle; it is complete or absent.

    Raises:
        UserError: the device cannot run the model, the model is of a family that the device's scripts do not know, its
            preprocessing is unknown, no picture has a detection, or nothing can be written to ``output``.
    """
    target = find_target(request.target)
    version = target.version(request.tensorrt)
    output = Path(request.output)
    if output.suffix != ".tar":
        raise UserError(f"--output is {output}, expected a file name that ends in .tar, such as {target.name}.tar")
    require_writable_file(output, "--output", f"{target.name}.tar")
    if request.batch is not None and request.batch < 1:
        raise UserError(f"--batch is {request.batch}, expected at least 1")
    model = InferenceModel.load(request.model_path, request.model_filename, request.params_filename)
    advice = "" if request.pictures else "give --reader_config or --pictures"
    known = device_model(model, target, version, request.reader_config, advice)
    find_support(ENGINE, "fp32", "CPU").require()  # it detects in the pictures, long after the export has begun
    with tempfile.TemporaryDirectory(prefix="act-bundle-") as made:
        folder = Path(made) / output.stem
        folder.mkdir()
        say(f"writing the ONNX file for {target.device}")
        lowered = write_onnx(model, folder / MODEL, target, version, request.batch, known.nms, "onnxruntime")
        files = {"onnxruntime": MODEL, "openvino": MODEL} if target.name == "cpu" else {"onnxruntime": MODEL}
        if target.name == "cpu" and known.quantized:
            # Each of the two computes convolutions in INT8 only in its own form.
            source = Path(made) / MODEL
            write_onnx(model, source, target, version, request.batch, known.nms, "openvino")
            write_openvino(source, folder / OPENVINO_MODEL)
            files["openvino"] = OPENVINO_MODEL
        dla = _write_dla(request, target, version, known.quantized, folder, known.nms)
        OnnxModel(folder / MODEL).record_path.unlink()  # it names paths of this machine
        onnx_summary = inspect_onnx(OnnxModel(folder / MODEL))
        batch = lowered.batch or request.batch or target.batch
        profile = None
        if lowered.batch is None and version is not None:
            profile = make_profile(OnnxModel(folder / MODEL), onnx_summary, batch)
            profile = {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
        description = describe(
            target,
            version,
            lowered,
            onnx_summary,
            known.decoder,
            steps=known.steps,
            classes=known.classes,
            batch=batch,
            profile=profile,
            files=files,
            source_hash=model.content_hash(),
        )
        say("detecting in the pictures")
        expected = expected_detections(model, known.quantized, known.reader, request.pictures)
        _write_rest(folder, description, expected, model, target, version, dla)
        _pack(folder, output)
    return Bundle(output, description, tuple(_advice(target, onnx_summary.input_size, dla)))


def _write_dla(
    request: BundleRequest, target: Target, version: Version | None, quantized: bool, folder: Path, nms: str
) -> str | None:
    """Write the float ONNX file for the deep learning accelerator; return its name, None: there is none."""
    from act_pipeline.onnx_export import lower

    asked = request.float_model_path
    if asked is not None and (not target.dla or not quantized):
        why = f"{target.device} has none" if not target.dla else f"{request.model_path} is a float model already"
        raise UserError(f"--float_model_path={asked} is for a deep learning accelerator, and {why}; leave it out")
    if version is None or not target.dla or (quantized and asked is None):
        return None
    path = asked if asked is not None else request.model_path
    model = InferenceModel.load(path, request.model_filename, request.params_filename)
    batch = request.batch or target.batch
    lower(
        model,
        folder / DLA_MODEL,
        "tensorrt",
        batch=batch,
        precision="fp32",
        # Before TensorRT 11 a network for the accelerator is weakly typed, from an FP32 file.
        float16=version.name == "11",
        nms=nms,
    )
    (folder / DLA_MODEL).with_suffix(".json").unlink()
    spell_for(folder / DLA_MODEL, version, str(model.directory))
    return DLA_MODEL


def _write_rest(
    folder: Path,
    description: dict[str, Any],
    expected: Expected,
    model: InferenceModel,
    target: Target,
    version: Version | None,
    dla: str | None,
) -> None:
    (folder / "bundle.json").write_text(_json(description), encoding="utf-8")
    (folder / "expected.json").write_text(_json(expected.record), encoding="utf-8")
    (folder / "pictures").mkdir()
    for source, name in expected.files:
        shutil.copyfile(source, folder / name)
    copy_infer_cfg(model, folder)
    scripts = ["preprocess.py", "run.py", "verify.py"]
    if version is not None:
        scripts += ["tensorrt_runtime.py", "build.py"]
        script = build_script(
            target,
            version,
            MODEL,
            quantized=description["precision"] == "int8",
            profile=description["profile"],
            dla_model=dla,
        )
        (folder / "build.sh").write_text(script, encoding="utf-8")
    for name in scripts:
        shutil.copyfile(DEVICE_FILES / name, folder / name)
    (folder / "README.md").write_text(guide(target, version, description, dla is not None), encoding="utf-8")


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _pack(folder: Path, output: Path) -> None:
    """Write the folder as a tar: the same bytes for the same content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            entry = archive.gettarinfo(str(path), arcname=str(path.relative_to(folder.parent)))
            executable = path.is_dir() or path.name in ("build.sh", "run.py", "verify.py", "build.py")
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
            entry.mode = 0o755 if executable else stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH
            with open(path, "rb") if path.is_file() else contextlib.nullcontext() as file:
                archive.addfile(entry, file)
    write_bytes_atomically(output, buffer.getvalue())


def _advice(target: Target, size: tuple[int, int] | None, dla: str | None) -> Sequence[str]:
    """Return what the user should know, one line each."""
    found = []
    if not target.int8:
        found.append(
            f"{target.device} has no INT8: the bundle computes in FP16, half of the bytes and up to twice as fast as "
            "FP32; one stream of single pictures, since it has memory and speed for no more"
        )
    if target.largest_input is not None and size is not None and max(size) > target.largest_input:
        found.append(
            f"the input is {size[0]} x {size[1]}: for {target.device} at most {target.largest_input} x "
            f"{target.largest_input} is advised, {(max(size) / target.largest_input) ** 2:.1f} times less work; export "
            "the model so (img_shape of its export), and evaluate it again, since a smaller input costs mAP"
        )
    if dla is not None:
        found.append("build.sh --dla builds for the deep learning accelerator, in FP16: it computes no Q/DQ pairs")
    return found
