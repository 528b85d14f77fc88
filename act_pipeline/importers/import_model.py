"""From an ONNX file to a float `InferenceModel`, checked against ONNX Runtime."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from act_pipeline.core.artifacts import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.output_folders import new_artifact, require_replaceable
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.core.records import versions, write_record
from act_pipeline.families import grounding_dino, sam
from act_pipeline.families.interface import NMS_KEYS, DetectorFamily, PairedFamily, PostProcess
from act_pipeline.families.prompt import PIXEL_MASKS, TEXT_INPUTS, Prompt
from act_pipeline.families.registry import POST_PROCESS_IN_GRAPH, family_named, find_family
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.importers.onnx.convert import Converted, convert, require_known_ops
from act_pipeline.importers.onnx.pictures import Pictures
from act_pipeline.importers.onnx.read import Constants, input_names, read_onnx, require_importers
from act_pipeline.importers.onnx.source import OnnxInput, OnnxSource
from act_pipeline.importers.onnx.verify import TOLERANCE, Reference, state_difference

IMPORT_SCHEMA = "act_pipeline.import/1"
RECORD_FILENAME = "import.json"
_LEAVE_OUT = "leave the prompt out"
# Inputs that a reader gives, and those that a prompt gives.
_FED = ("image", "im_shape", "scale_factor", *TEXT_INPUTS, *PIXEL_MASKS)
Freeze = Literal["pixel_mask", "prompt"]


@dataclass(frozen=True)
class ImportedModel:
    """A model made from an ONNX file.

    Attributes:
        model: the model folder.
        inputs: name in the program -> shape; -1 for an open batch.
        outputs: (ONNX name, shape) in the order of the program's outputs.
        max_difference: largest difference to ONNX Runtime, see :meth:`.onnx.verify.Reference.difference`.
        family: the detector family of its outputs; None: they are of none, so that nothing can evaluate the model.
        fixed_batch: why the batch is fixed; empty if it is open.
        paddle3_difference: largest difference to the model of Paddle 3 that the ONNX file was made from; None: of none.
        named_classes: whether the class names are known.
        compared_on: what was compared with ONNX Runtime, in a few words.
    """

    model: InferenceModel
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    max_difference: float
    family: DetectorFamily | None = None
    fixed_batch: str = ""
    paddle3_difference: float | None = None
    named_classes: bool = True
    compared_on: str = ""

    def summary(self) -> str:
        """Return what was made, in a few lines."""
        inputs = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        outputs = ", ".join(f"{name} {list(shape)}" for name, shape in self.outputs)
        lines = [
            f"imported {self.model.directory}: {self.model.bytes / 1e6:.2f} MB; inputs {inputs}; outputs {outputs}"
        ]
        if self.fixed_batch:
            lines.append(f"the batch is fixed: {self.fixed_batch}")
        lines.append(f"largest difference to ONNX Runtime: {self.max_difference:.1e}, on {self.compared_on}")
        unfed = [name for name in self.inputs if name not in _FED]
        if unfed and self.family is not sam.DECODER_FAMILY:
            names = " and ".join(unfed)
            lines.append(
                f"nothing feeds the input {names}, so that the other commands refuse the model; export it without"
            )
        if self.paddle3_difference is not None:
            lines.append(f"largest difference to Paddle 3: {self.paddle3_difference:.1e}")
        if self.family is None:
            lines.append("the outputs are of no detector family, so nothing can evaluate the model")
        else:
            lines.append(f"detector family: {self.family.name} ({self.family.outputs})")
            if not self.named_classes:
                lines.append(
                    "the file has no class names: categories of a data set are taken in their order; if the model's "
                    "order is another one, set label_list in infer_cfg.yml"
                )
        return "\n".join(lines)


def import_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    images: str | os.PathLike[str] | None = None,
    fixed_batch: bool = False,
    family: str | None = None,
    prompt: Prompt | None = None,
    freeze: Freeze | None = None,
    mask_decoder: str | os.PathLike[str] | None = None,
) -> ImportedModel:
    """Convert an ONNX file to a Paddle model folder, and compare it with ONNX Runtime.

    Args:
        path: the ONNX file. Half and double precision become float32.
        output: the folder to write; None: ``output_inference/<stem of the file>``.
        input_shape: input name -> shape, for inputs with open dimensions besides the batch. An empty name stands for
            the only input with so many dimensions.
        images: a folder with pictures, or one, to compare with; None: scenes of the built-in sample. They are prepared
            as for the family. Inputs that are no picture are given random numbers.
        family: the detector family, a name of :mod:`act_pipeline.families`; None: as the outputs say.
        fixed_batch: keep the batch of the file; else it is left open where the graph computes each image by itself.
        prompt: for a model that takes text: what it looks for (:func:`act_pipeline.families.prompt.make_prompt`). It
            can be changed later, see :func:`write_prompt`.
        freeze: inputs that the prompt gives and that become constants, so that what depends on them only is computed
            once: ``pixel_mask`` (no pixel is padding), or ``prompt``, which are all of them: another prompt then needs
            another import. None: none.
        mask_decoder: for the image encoder of a Segment Anything: the folder of its mask decoder, imported before. Each
            folder's ``infer_cfg.yml`` names the other one.

    Returns:
        The model: ``model.pdmodel``, ``model.pdiparams``, ``infer_cfg.yml`` and the record ``import.json``. The image
        input, the only one of shape [N, 3, H, W], is called ``image``; all other inputs keep their names and types.

    Raises:
        UserError: the file is damaged, an input's shape is open, an op cannot be converted, the results differ by more
            than :data:`.onnx.verify.TOLERANCE`, the outputs are not those of ``family``, the model takes text and there
            is no prompt, or a package of the extra ``importers`` is missing.
    """
    require_importers()
    known: DetectorFamily | None = None if family is None else family_named(family, "--family")
    if mask_decoder is not None or prompt is not None:
        known = sam.FAMILY if mask_decoder is not None else grounding_dino.FAMILY
    file = Path(path)
    directory = Path(output) if output is not None else Path("output_inference") / file.stem
    pictures = Pictures.of(None if images is None else Path(images))
    require_replaceable(directory, RECORD_FILENAME, "--output")
    source = read_onnx(file, input_shape, _frozen(file, prompt, freeze))
    require_known_ops(source)
    _require_one_image(source)
    if prompt is None:
        _require_no_text(source)
    decoder = None if mask_decoder is None else _mask_decoder(mask_decoder)
    reference = Reference(source, pictures, known)
    with new_artifact(directory) as staging, static_mode():
        model, converted, difference, reason = _converted(source, reference, staging / "made", fixed_batch)
        for written in model.directory.iterdir():
            shutil.move(str(written), staging / written.name)
        shutil.rmtree(model.directory)
        inputs, outputs = _described(source, converted)
        found = _family(file, outputs, None if known is None else known.name)
        if found is not sam.DECODER_FAMILY:
            _require_image(source)
        write_infer_cfg(staging, source, found, prompt)
        if decoder is not None:
            _write_keys(InferenceModel(staging), {sam.MASK_DECODER: os.path.relpath(decoder.directory, directory)})
        record = _record(source, inputs, outputs, difference, reason)
        record["compared_on"] = reference.compared_on
        write_record(staging / RECORD_FILENAME, IMPORT_SCHEMA, record)
        converted.graph.close()
    if decoder is not None:
        _write_keys(decoder, {sam.IMAGE_ENCODER: os.path.relpath(directory, decoder.directory)})
    return ImportedModel(
        InferenceModel.load(directory),
        {name: tuple(entry["shape"]) for name, entry in inputs.items()},
        tuple((entry["name"], tuple(entry["shape"])) for entry in outputs),
        difference,
        found,
        reason,
        named_classes=bool(source.class_names or prompt is not None or isinstance(found, PairedFamily)),
        compared_on=reference.compared_on,
    )


def require_text(model: str | os.PathLike[str] | InferenceModel) -> None:
    """Check that a model takes text.

    Args:
        model: an ONNX file, or an imported model.

    Raises:
        UserError: it does not, or the file cannot be read.
    """
    if isinstance(model, InferenceModel):
        where, names = model.directory, tuple(inspect_model(model).inputs)
    else:
        where, names = Path(model), input_names(Path(model))
    if not set(names) & set(TEXT_INPUTS):
        frozen = isinstance(model, InferenceModel) and model.infer_cfg().get("prompt")
        raise _takes_no_text(where, names, "import it again: its prompt was frozen" if frozen else _LEAVE_OUT)


def write_prompt(model: InferenceModel, prompt: Prompt) -> None:
    """Write another prompt into the ``infer_cfg.yml`` of a float or INT8 model that takes text.

    Args:
        model: the model folder.
        prompt: what it looks for.

    Raises:
        UserError: the model takes no text, or fewer tokens.
    """
    require_text(model)
    summary = inspect_model(model)
    prompt.inputs(summary.inputs, summary.input_dtypes, model.directory)  # checks its length
    _write_keys(model, _prompt_keys(prompt))


def _write_keys(model: InferenceModel, keys: Mapping[str, Any]) -> None:
    content = {**model.infer_cfg(), **keys}
    write_text_atomically(model.infer_cfg_path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _mask_decoder(folder: str | os.PathLike[str]) -> InferenceModel:
    """Return the mask decoder in a folder.

    Raises:
        UserError: there is none.
    """
    try:
        model = InferenceModel.load(folder)
    except UserError as error:
        found = str(error).rsplit("; ", 1)[0]  # without its remedy, which is about detectors
        raise UserError(
            f"the mask decoder: {found}; import the decoder first (tools/import_model.py --onnx decoder.onnx), and "
            "give its folder"
        ) from None
    find_family(inspect_model(model).output_shapes, model.directory, sam.DECODER_FAMILY.name)
    return model


def write_infer_cfg(
    directory: Path, source: OnnxSource, family: DetectorFamily | None, prompt: Prompt | None = None
) -> None:
    """Write ``infer_cfg.yml``: family, thresholds, class names and prompt, but no preprocessing."""
    content: dict[str, Any] = {"mode": "paddle", "draw_threshold": 0.5, "metric": "COCO", "use_dynamic_shape": False}
    if family is not None:
        content["arch"] = family.name
        has_nms = family is not POST_PROCESS_IN_GRAPH and not isinstance(family, PairedFamily)
        if has_nms:  # the thresholds are the user's to change
            content["NMS"] = {key: getattr(PostProcess(), key) for key in NMS_KEYS}
    if source.class_names:
        content["label_list"] = list(source.class_names)
    if prompt is not None:
        content.update(_prompt_keys(prompt))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (directory / INFER_CFG_FILENAME).write_text(text, encoding="utf-8")


def _family(file: Path, outputs: Sequence[Mapping[str, Any]], asked: str | None) -> DetectorFamily | None:
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in outputs}
    if asked is not None:
        return find_family(shapes, file, asked)
    try:
        return find_family(shapes, file)
    except UserError:  # part of a detector, such as a backbone
        return None


def _require_one_image(source: OnnxSource) -> None:
    """Check that at most one input may be the picture, or that one of them was named."""
    found = [each for each in source.inputs if each.is_image]
    if len(found) > 1 and source.image is None:
        first = f"{found[0].name}:{','.join(map(str, found[0].shape))}"
        raise UserError(
            f"{source.path} has several inputs that may be the picture: {', '.join(each.name for each in found)}, "
            f"expected one [N, 3, H, W]; name it alone, as in --input_shape {first}, or export the model with one"
        )


def _require_image(source: OnnxSource) -> None:
    if source.image is None:
        found = ", ".join(f"{each.name} {list(each.shape)}" for each in source.inputs)
        raise UserError(
            f"{source.path} has no input for a picture (its inputs are {found or 'all constant'}), expected one "
            "[N, 3, H, W]; export the model with one"
        )


def _require_no_text(source: OnnxSource) -> None:
    """Check that the outputs depend on no text, without which nothing can run the model."""
    used = {name for node in source.nodes for name in node.inputs}
    text = [each.name for each in source.inputs if each.name in TEXT_INPUTS and each.name in used]
    if text:
        raise UserError(
            f"{source.path} takes text ({', '.join(text)}), expected what it looks for; give --prompt with --vocab or "
            "--input_ids (in Python: prompt=make_prompt(...))"
        )


def _prompt_keys(prompt: Prompt) -> dict[str, Any]:
    return {"arch": grounding_dino.FAMILY.name, "label_list": list(prompt.classes), "prompt": prompt.section()}


def _frozen(path: Path, prompt: Prompt | None, freeze: Freeze | None) -> Constants | None:
    """Return what checks, before the conversion, that a prompt fits an ONNX file, and selects what becomes constant."""
    if prompt is None:
        if freeze is not None:
            raise UserError(f"{path}: freeze is {freeze!r}, but there is no prompt; give one, or leave it out")
        return None

    def constants(inputs: Sequence[OnnxInput]) -> Mapping[str, np.ndarray]:
        shapes = {each.name: each.shape for each in inputs}
        found = prompt.inputs(shapes, {each.name: each.dtype for each in inputs}, path)
        if not found:
            raise _takes_no_text(path, shapes)
        masks = {name: value for name, value in found.items() if name in PIXEL_MASKS}
        if freeze == "pixel_mask" and not masks:
            raise UserError(
                f"{path} has no input {PIXEL_MASKS[0]} to freeze (its inputs are {', '.join(shapes)}); leave freeze out"
            )
        return {} if freeze is None else masks if freeze == "pixel_mask" else found

    return constants


def _takes_no_text(where: Path, inputs: Iterable[str], remedy: str = _LEAVE_OUT) -> UserError:
    return UserError(
        f"{where} takes no text (its inputs are {', '.join(inputs)}), expected an input {TEXT_INPUTS[0]}; {remedy}"
    )


def _converted(
    source: OnnxSource, reference: Reference, folder: Path, fixed_batch: bool
) -> tuple[InferenceModel, Converted, float, str]:
    """Return the model with an open batch if it computes the same, else with the file's, and why."""
    fixed = convert(source)
    reason = "as asked for" if fixed_batch else ""
    if not reason:
        try:
            opened = convert(source, fixed.shapes)
            try:
                model = _saved(source, opened, folder)
                difference = max(reference.difference(model, opened, batched) for batched in (True, False))
                if difference <= TOLERANCE:
                    fixed.graph.close()
                    return model, opened, difference, ""
                reason = (
                    f"with an open batch, what three images give together differs by {state_difference(difference)}"
                )
            except BaseException:
                opened.graph.close()
                raise
            opened.graph.close()
        except UserError as error:
            reason = str(error).removeprefix(f"{source.path}: ")
        shutil.rmtree(folder, ignore_errors=True)
    model = _saved(source, fixed, folder)
    difference = reference.difference(model, fixed, batched=False)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{source.path}: what was imported differs from ONNX Runtime by {state_difference(difference)}, expected "
            f"at most {TOLERANCE:g}; if the model chooses by a top-k, compare it on pictures with --images"
        )
    return model, fixed, difference, reason


def _saved(source: OnnxSource, converted: Converted, folder: Path) -> InferenceModel:
    """Write the program and its parameters.

    Raises:
        UserError: there are no parameters.
    """
    folder.mkdir()
    with quiet_upstream():  # Paddle warns where there are no parameters, and writes no file for them
        model = converted.graph.save(folder)
    if not model.params_path.exists():
        raise UserError(f"{source.path} has no weights that its outputs depend on, expected a trained detector")
    return model


def _described(source: OnnxSource, converted: Converted) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return inputs and outputs as the record has them; inputs that no output depends on are left out."""
    block = converted.graph.program.global_block()
    dtypes = {each.name: each.dtype for each in source.inputs}
    inputs = {
        known: {"shape": list(block.var(known).shape), "dtype": dtypes[name], "onnx_name": name}
        for name, known in converted.inputs.items()
        if known in converted.graph.feed_names
    }
    targets = converted.graph.fetch_targets
    outputs = [{"name": name, "shape": list(target.shape)} for name, target in zip(source.outputs, targets)]
    return inputs, outputs


def _record(
    source: OnnxSource, inputs: dict[str, Any], outputs: list[dict[str, Any]], difference: float, reason: str
) -> dict[str, Any]:
    return {
        "source": source.path.name,
        "source_hash": hash_files([source.path]),
        "opset": source.opset,
        "inputs": inputs,
        "outputs": outputs,
        "fixed_batch": reason or None,
        "max_difference": difference,
        "versions": {**versions(), "onnxslim": importlib.metadata.version("onnxslim")},
    }
