"""``bundle.json``, which the device's scripts read, and the bundle's README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.engines.onnx_runtimes.onnx_files import OnnxSummary
from act_pipeline.engines.tensorrt.targets import RTX, Target, Version
from act_pipeline.families.registry import Decoder
from act_pipeline.onnx_export import Lowered

SCHEMA = "act_pipeline.bundle/1"
# The steps that preprocess.py of the device computes.
STEPS = ("Resize", "LetterBoxResize", "Pad", "NormalizeImage", "Permute")
_INPUTS = ("image", "im_shape", "scale_factor")


def device_steps(reader: Any) -> list[dict[str, Any]]:
    """Return a reader's transforms for the device, ``{"type": name, arguments}`` each, without the decoding.

    Args:
        reader: a :class:`act_pipeline.data.Reader`.

    Raises:
        UserError: the device's scripts do not know a transform.
    """
    section = reader.settings.reader
    steps = [
        {"type": name, **(arguments or {})}
        for step in section.sample_transforms
        for name, arguments in step.items()
        if name != "Decode"
    ]
    further = [name for step in section.batch_transforms for name in step]
    unknown = [step["type"] for step in steps if step["type"] not in STEPS] + further
    if unknown or not steps or steps[-1]["type"] != "Permute":
        found = ", ".join([*(step["type"] for step in steps), *further])
        raise UserError(
            f"the preprocessing of {reader.path} is {found}, expected {', '.join(STEPS)} with Permute at the end: a "
            "bundle has no others; take them out if the model does not need them"
        )
    return steps


def describe(
    target: Target,
    version: Version | None,
    lowered: Lowered,
    summary: OnnxSummary,
    decoder: Decoder,
    *,
    steps: Sequence[dict[str, Any]],
    classes: Sequence[str],
    batch: int,
    profile: Mapping[str, Any] | None,
    files: Mapping[str, str],
    source_hash: str,
) -> dict[str, Any]:
    """Return the content of ``bundle.json``.

    Args:
        target: the device.
        version: its TensorRT; None: it has none.
        lowered: the exported file.
        summary: its summary.
        decoder: of the model's outputs.
        steps: the preprocessing.
        classes: names of the classes.
        batch: the largest batch.
        profile: input name -> the smallest, the optimal and the largest shape; None: the batch is fixed, or there is no
            TensorRT.
        files: runtime -> the model's file, besides TensorRT's plan.
        source_hash: of the model.

    Raises:
        UserError: the model takes other inputs than a picture, or has an open input size.
    """
    unknown = [name for name in summary.inputs if name not in _INPUTS]
    if unknown or summary.input_size is None:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in summary.inputs.items())
        raise UserError(
            f"{decoder.where} takes {found}, expected {', '.join(_INPUTS)} with a fixed height and width; export the "
            "model so"
        )
    stated = lowered.detections or {"family": decoder.family.name, "post": asdict(decoder.post)}
    names = list(summary.outputs)
    roles = None
    if stated["family"] == "detr_raw":
        raw = decoder.family.raw(dict(summary.output_shapes), decoder.post.num_classes)
        roles = None if raw is None else [names.index(raw.scores.output), names.index(raw.boxes.output)]
    return {
        "schema": SCHEMA,
        "target": target.name,
        "device": target.device,
        "runtime": "TensorRT-RTX" if version is not None and version.name == RTX else "OpenVINO or ONNX Runtime",
        "tensorrt": None if version is None else version.name,
        "typed": version is not None and version.typed,
        "jetpack": None if version is None else target.jetpack.get(version.name),
        "compute_capabilities": list(target.compute_capabilities),
        "workspace_mib": target.workspace_mib,
        "model": lowered.path.name,
        "files": dict(files),
        "precision": lowered.precision,
        "float16": lowered.float16 or (version is not None and not version.typed),
        "family": stated["family"],
        "post": {key: value for key, value in stated["post"].items() if key != "class_tokens"},
        "roles": roles,
        "inputs": {name: list(shape) for name, shape in summary.inputs.items()},
        "outputs": names,
        "input_size": list(summary.input_size),
        "batch": batch,
        "fixed_batch": lowered.batch is not None,
        "profile": profile,
        "preprocess": list(steps),
        "classes": list(classes),
        "source_hash": source_hash,
    }


def guide(target: Target, version: Version | None, description: Mapping[str, Any], dla: bool) -> str:
    """Return the README of a bundle: the steps on the device.

    Args:
        target: the device.
        version: its TensorRT; None: it has none.
        description: content of ``bundle.json``.
        dla: whether there is a file for the deep learning accelerator.
    """
    pack = description["jetpack"]
    if version is None:
        needs = "Python, NumPy, OpenCV (or Pillow), and OpenVINO or ONNX Runtime: `pip install opencv-python openvino`"
    elif version.name == RTX:
        needs = "Python, NumPy, OpenCV (or Pillow), and TensorRT-RTX with its Python module"
    elif pack:
        needs = f"JetPack {pack}, which has {version.title}, Python, NumPy and OpenCV"
    else:
        needs = f"an NVIDIA driver, {version.title} with its Python module, NumPy, and OpenCV (or Pillow)"
    lines = [f"# {target.device}", "", f"Needs {needs}.", "", "```"]
    if version is not None:
        lines.append("./build.sh                          # once: model.plan, for this machine")
        if dla:
            lines.append("./build.sh --dla                    # or: for the deep learning accelerator, in FP16")
    lines += [
        "python3 verify.py                   # does this machine detect what is expected? exit code 0 or 1",
        "python3 run.py --repeat 50          # the bundle's pictures, and milliseconds",
        "python3 run.py --video 0            # a camera, with frames a second; or a file",
        "python3 verify.py --coco annotations.json --images images   # mAP of a data set",
        "```",
        "",
        "| file | content |",
        "|---|---|",
        *_model_rows(description),
        "| `bundle.json` | preprocessing, class names, inputs, outputs, profile |",
        "| `expected.json`, `pictures/` | what the model detects where the bundle was made |",
        "| `run.py`, `verify.py`, `preprocess.py` | the programs above |",
    ]
    return "\n".join(lines) + "\n"


def _model_rows(description: Mapping[str, Any]) -> list[str]:
    """Return the lines of the README's table about the model's files."""
    model, precision, files = description["model"], description["precision"], description["files"]
    if files.get("openvino", model) == model:
        return [f"| `{model}` | the model, {precision} |"]
    return [
        f"| `{files['openvino']}` with its `.bin` | the model for OpenVINO, {precision} |",
        f"| `{model}` | the same for ONNX Runtime |",
    ]
