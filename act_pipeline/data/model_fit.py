"""Check, before any other work, that a reader's preprocessing and classes fit a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel, described_by
from act_pipeline.core.errors import UserError
from act_pipeline.data.classes import ModelClasses
from act_pipeline.data.infer_cfg import (
    Described,
    check_transforms,
    normalizes,
    pads,
    pads_right_and_below,
    without_normalization,
)
from act_pipeline.data.reader import Reader
from act_pipeline.data.reader_settings import Prompts
from act_pipeline.engines import Artifact, inspect_artifact
from act_pipeline.families.interface import PairedFamily
from act_pipeline.families.prompt import TEXT_INPUTS, Prompt
from act_pipeline.families.registry import FAMILIES, decoder_of
from act_pipeline.families.sam import DECODER_FAMILY, IMAGE_ENCODER
from act_pipeline.graph.detector_graph import DetectorGraph, read_detector_graph

_logger = logging.getLogger(__name__)
_DEFAULT_CLASSES = 80  # of COCO, whose names PaddleDetection writes if it finds no others


@dataclass(frozen=True)
class Fit:
    """A reader adapted to a model.

    Attributes:
        reader: its preprocessing and its class indices are those of the model.
        notes: the changes made, one line each.
    """

    reader: Reader
    notes: tuple[str, ...] = ()


def fit_reader(model: Artifact, reader: Reader) -> Fit:
    """Adapt a reader to a model and check input size, preprocessing, padding and classes.

    The annotation files are not read here; their categories are matched with the model's classes when they are read
    (:meth:`Reader.class_ids`).

    Args:
        model: its ``infer_cfg.yml`` and its graph define the expected input.
        reader: the reader as configured; it is not changed.

    Raises:
        UserError: reader and model contradict each other.
    """
    described, graph, labels = _known(model)
    size = inspect_artifact(model).input_size
    _check_size(model, size, reader)
    reader, notes = _normalized_once(described, graph, reader)
    check_transforms(described, reader.settings, size_is_known=size is not None)
    _check_padding(model, graph, reader)
    classes, told_of_classes = _classes(labels, graph, described.source)
    said = tuple(told_of_classes)
    asked = reader.settings.num_classes
    if classes is not None and asked not in (None, classes.count):
        where = reader.settings.source.locate("num_classes")
        said = (*said, f"{where} is {asked}, but the model has {classes.count} classes ({classes.source}), which count")
    constants = constant_inputs(model)
    reader = reader.with_constants(constants) if constants else reader
    prompts = prompts_of(model)
    reader = reader if prompts is None else reader.with_prompts(prompts)
    return Fit(reader if classes is None else reader.with_classes(classes), (*notes, *said))


def constant_inputs(model: Artifact) -> dict[str, np.ndarray]:
    """Return the inputs of a model that are the same for every image: the tokens of its prompt.

    Args:
        model: the section ``prompt`` of its ``infer_cfg.yml`` determines them.

    Returns:
        Name -> [1, ...] of the model's dtype; empty for a model without text.

    Raises:
        UserError: the model takes text and has no prompt, or its prompt is not valid.
    """
    found = prompt_inputs(model)
    text = None if found else next((name for name in TEXT_INPUTS if name in inspect_artifact(model).inputs), None)
    if text is not None:
        raise UserError(
            f"{_location(model)} takes text ({text}), but no infer_cfg.yml beside it has a section prompt; import the "
            "model with a prompt"
        )
    return found


def prompt_inputs(model: Artifact) -> dict[str, np.ndarray]:
    """Return the inputs that the prompt of a model gives, as :func:`constant_inputs`; empty without a prompt."""
    folder = described_by(model)
    prompt = None if folder is None else Prompt.of(folder.infer_cfg(), str(folder.infer_cfg_path))
    if prompt is None:
        return {}
    summary = inspect_artifact(model)
    return prompt.inputs(summary.inputs, summary.input_dtypes, _location(model))


def prompts_of(model: Artifact) -> Prompts | None:
    """Return what the boxes of the data sets are prompts of; None: the model finds objects by itself.

    Args:
        model: a model of a pair names the other one in its ``infer_cfg.yml``.

    Raises:
        UserError: it names none.
    """
    shapes = dict(inspect_artifact(model).output_shapes)
    if not any(isinstance(family, PairedFamily) and family.fits(shapes) for family in FAMILIES):
        return None
    folder, decoder = described_by(model), decoder_of(model, shapes)
    if not isinstance(decoder.family, PairedFamily):
        return None
    if decoder.partner is None:
        where = _location(model) if folder is None else folder.infer_cfg_path
        raise UserError(
            f"{where} has no {decoder.family.partner}, expected the folder of the model that makes masks together with "
            f"this {decoder.family.name}; import it, and write its path there"
        )
    makes_inputs = decoder.family.partner == IMAGE_ENCODER
    return Prompts(decoder.partner if makes_inputs else None, decoder.partner.content_hash())


def with_embeddings(model: Artifact, reader: Reader) -> Reader:
    """Return a reader whose batches have the embeddings that a mask decoder takes; the same one for other models.

    Args:
        model: its ``infer_cfg.yml`` names the encoder that makes them.
        reader: the reader; it is not changed.

    Raises:
        UserError: it names none.
    """
    if not DECODER_FAMILY.fits(dict(inspect_artifact(model).output_shapes)):
        return reader
    prompts = prompts_of(model)
    return reader if prompts is None else reader.with_prompts(prompts)


def reader_of_model(model: Artifact, reader: Reader) -> Reader:
    """Return a reader with the preprocessing of the model's ``infer_cfg.yml``, or the same reader if there is none.

    Args:
        model: the model.
        reader: the reader whose data sets are used.
    """
    described, _, _ = _known(model)
    if not described.steps:
        return reader
    return reader.with_transforms([{"Decode": {}}, *({name: dict(arguments)} for name, arguments in described.steps)])


def with_classes_of(model: Artifact, reader: Reader) -> Reader:
    """Return a reader that matches categories with a model's classes, without any other check.

    Args:
        model: the model.
        reader: the reader; it is not changed.

    Raises:
        UserError: the model's own records of its classes contradict each other.
    """
    described, graph, labels = _known(model)
    classes, _ = _classes(labels, graph, described.source)
    return reader if classes is None else reader.with_classes(classes)


def log_notes(notes: Sequence[str]) -> None:
    """Log notes as warnings."""
    for note in notes:
        _logger.warning("%s", note)


def _known(model: Artifact) -> tuple[Described, DetectorGraph, Any]:
    """Return a model's preprocessing, its graph, and its ``label_list``, read from its folder."""
    folder = described_by(model)
    if folder is None:
        return Described(None, str(model.directory)), DetectorGraph(), None
    content = folder.infer_cfg()
    graph = read_detector_graph(folder) if folder.model_path.is_file() else DetectorGraph()
    if content.get("prompt"):  # the prompt determines the classes, not the graph
        graph = dataclasses.replace(graph, num_classes=None)
    return Described.of(content, str(folder.infer_cfg_path)), graph, content.get("label_list")


def _check_size(model: Artifact, size: tuple[int, int] | None, reader: Reader) -> None:
    height, width = reader.input_size
    if size is not None and tuple(size) != (height, width):
        raise UserError(
            f"{reader.path}: the reader resizes to {height} x {width}, but {_location(model)} takes {size[0]} x "
            f"{size[1]}; set its Resize.target_size, or export the model so"
        )


def _normalized_once(described: Described, graph: DetectorGraph, reader: Reader) -> tuple[Reader, list[str]]:
    """Remove ``NormalizeImage`` from a reader whose model normalizes in the graph (``TestReader.fuse_normalize``).

    The graph of an imported model, whose ``infer_cfg.yml`` describes no preprocessing, may expect pixels of 0 to 1 or
    of 0 to 255 where it normalizes: there the reader decides.
    """
    in_cfg = described.has("NormalizeImage")
    if in_cfg or not normalizes(reader.settings):
        return reader, []
    if graph.normalizes and in_cfg is None and Path(described.source).is_file():
        return reader, [
            f"{reader.path}: NormalizeImage comes before what the graph itself does to the picture, and "
            f"{described.source} has no Preprocess; if the model takes pixels of 0 to 255, delete NormalizeImage"
        ]
    if graph.normalizes is False and in_cfg is False:
        where = reader.settings.source.locate(f"{reader.settings.reader_name}.sample_transforms")
        raise UserError(
            f"{where} have NormalizeImage, but {described.source} names none in Preprocess, and the graph does not "
            "normalize either; take it out of the reader if the model was trained on 0 to 255, or write it into "
            "Preprocess"
        )
    if graph.normalizes or in_cfg is False:
        note = (
            f"{reader.path}: NormalizeImage is left out, since the graph normalizes ({described.source}, "
            "fuse_normalize)"
        )
        return reader.with_transforms(without_normalization(reader.settings)), [note]
    return reader, []


def _check_padding(model: Artifact, graph: DetectorGraph, reader: Reader) -> None:
    how = pads(reader.settings)
    if how is None or graph.decodes_padding is None:
        return
    where = reader.settings.source.locate(f"{reader.settings.reader_name}.sample_transforms")
    if not pads_right_and_below(reader.settings):
        raise UserError(
            f"{where}: {how} moves the picture on its canvas, which the boxes of {_location(model)} are not moved "
            "back for; use Resize with keep_ratio: True and Pad with pad_mode: 0"
        )
    if not graph.decodes_padding:
        raise UserError(
            f"{where} keep the ratio and pad, but {_location(model)} decodes boxes as if pictures were not padded; "
            "if it was trained so, export it with -o DETRPostProcess.bbox_decode_type=pad, else use Resize with "
            "keep_ratio: False"
        )


def _classes(labels: Any, graph: DetectorGraph, source: str) -> tuple[ModelClasses | None, list[str]]:
    """Return the model's classes, None if unknown, and notes for the user."""
    where = f"{source}: label_list"
    names = [str(label) for label in labels] if isinstance(labels, list) and labels else None
    count = graph.num_classes
    if names is None:
        return (ModelClasses(count, None, source), []) if count else (None, [])
    if count is None or count == len(names):
        return ModelClasses.named(names, where), []
    if len(names) == _DEFAULT_CLASSES and names[0] == "person":
        note = (
            f"{where} has COCO's 80 names, which PaddleDetection writes where it finds no annotation file, but the "
            f"model has {count} classes; they are taken in the order of the annotation file's categories"
        )
        return ModelClasses(count, None, source), [note]
    raise UserError(
        f"{where} names {len(names)} classes ({', '.join(names[:5])}), but the model has {count}; write its {count} "
        "names, in their order"
    )


def _location(model: Artifact) -> Path:
    return model.model_path if isinstance(model, InferenceModel) else model.path
