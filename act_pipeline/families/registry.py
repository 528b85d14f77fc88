"""The families, and which one a model is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.config import Config
from act_pipeline.core.artifacts import Artifact, InferenceModel, described_by, location
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.families import detr_raw, end2end, grounding_dino, nms_in_file, ppyoloe, rtdetr, sam, yolo
from act_pipeline.families.interface import DetectorFamily, Geometry, PairedFamily, PostProcess, Shapes
from act_pipeline.graph.model_files import inspect_model

POST_PROCESS_IN_GRAPH: DetectorFamily = rtdetr.FAMILY
# Of several families that outputs fit, the first one is taken. One array of PP-YOLOE has the shape of a YOLO's, and
# GroundingDINO's outputs look like those of `detr_raw`: only `arch` selects these two.
FAMILIES: tuple[DetectorFamily, ...] = (
    POST_PROCESS_IN_GRAPH,
    detr_raw.FAMILY,
    grounding_dino.FAMILY,
    yolo.FAMILY,
    end2end.FAMILY,
    ppyoloe.FAMILY,
    sam.FAMILY,
    sam.DECODER_FAMILY,
    *nms_in_file.FAMILIES,
)
_MOST_SHOWN = 6  # outputs in a message
_WITH_NMS = (POST_PROCESS_IN_GRAPH, *nms_in_file.FAMILIES)


@dataclass(frozen=True)
class Decoder:
    """Turns the outputs of one model into detections.

    Attributes:
        family: the model's family.
        post: thresholds, from the section ``NMS`` of ``infer_cfg.yml``.
        where: path of the model, for messages.
        partner: the other model of a pair, which a family with two models needs; None: there is none.
    """

    family: DetectorFamily
    post: PostProcess
    where: Path
    partner: Optional[InferenceModel] = None

    @property
    def key(self) -> str:
        """What determines the detections besides the model's outputs; empty where the graph gives them."""
        if self.family is POST_PROCESS_IN_GRAPH:
            return ""
        partner = "" if self.partner is None else f" {self.partner.content_hash()}"
        return f"{self.family.name} {self.post}{partner}"

    def __call__(self, outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ``bbox`` and ``bbox_num`` of a batch, see :class:`act_pipeline.families.interface.Detections`.

        A family with masks also has ``masks``, an array [K] of objects.

        Args:
            outputs: name -> array, in the model's order.
            inputs: the reader's batch, from which ``scale_factor``, ``im_shape``, ``pad_offset`` and ``prompts`` are
                read.

        Raises:
            UserError: the outputs do not have the form of the family.
        """
        shapes = {name: np.shape(array) for name, array in outputs.items()}
        if not self.family.fits({name: shape if np.prod(shape) else () for name, shape in shapes.items()}):
            raise _no_fit(self.where, shapes, self.family)
        images = len(next(iter(inputs.values()), ()))
        found = self.family.decode(outputs, Geometry.of(inputs, images), self.post)
        arrays = {"bbox": found.bbox, "bbox_num": found.bbox_num}
        if found.masks is not None:
            arrays["masks"] = np.empty(len(found.masks), object)
            arrays["masks"][:] = found.masks
        return arrays


class RawOutputsDecoder(Decoder):
    """Returns the outputs as they are: for a model whose outputs are another model's inputs."""

    def __call__(self, outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs."""
        return dict(outputs)


def undecoded(model: Artifact) -> RawOutputsDecoder:
    """Return what leaves the outputs of a model unchanged."""
    return RawOutputsDecoder(POST_PROCESS_IN_GRAPH, PostProcess(), location(model))


def decoder_of(model: Artifact, shapes: Shapes, family: DetectorFamily | None = None) -> Decoder:
    """Return the decoder of a model.

    Args:
        model: the model. ``arch`` in its ``infer_cfg.yml`` selects the family where it names one; otherwise the outputs
            do.
        shapes: its outputs.
        family: the family, instead.

    Raises:
        UserError: no family has such outputs, or the one that ``arch`` names has not.
    """
    where = location(model)
    folder = described_by(model)
    described: Mapping[str, Any] = folder.infer_cfg() if folder is not None else {}
    post = PostProcess.of(described, str(folder.infer_cfg_path) if folder is not None else "")
    arch = described.get("arch") if family is None else family.name
    found = find_family(shapes, where, arch)
    return Decoder(found, post, where, None if folder is None else partner_of(folder, found))


def partner_of(model: InferenceModel, family: DetectorFamily) -> InferenceModel | None:
    """Return the other model of a pair that ``infer_cfg.yml`` names; None: it names none, or the family has no pairs.

    Args:
        model: the folder with ``infer_cfg.yml``.
        family: the model's family.

    Raises:
        UserError: the folder that it names has no model.
    """
    if not isinstance(family, PairedFamily):
        return None
    folder = sam.partner_folder(model.infer_cfg(), model.directory, family.partner)
    if folder is None:
        return None
    if not folder.is_dir():
        raise UserError(
            f"{model.infer_cfg_path}: {family.partner} is {model.infer_cfg()[family.partner]}, and {folder} is no "
            "folder, expected the model folder of the other part; correct the path, or import it"
        )
    return InferenceModel.load(folder)


def decoder_for(config: Config, model: InferenceModel) -> Decoder:
    """Return the decoder of a config's float model, of the family that ``Global.arch`` names if it does.

    Raises:
        UserError: as :func:`decoder_of`; also if there is no such family.
    """
    arch = config.global_.arch
    family = None if arch is None else family_named(arch, f"{config.path}: Global.arch")
    return decoder_of(model, inspect_model(model).output_shapes, family)


def find_family(shapes: Shapes, where: Path, arch: object = None) -> DetectorFamily:
    """Return the family of a model.

    Args:
        shapes: the model's outputs.
        where: path of the model, for messages.
        arch: ``arch`` of ``infer_cfg.yml`` or ``Global.arch``. A value that names no family (PaddleDetection writes
            ``YOLO`` for PP-YOLOE, and names of which nothing is known here) leaves the choice to the outputs. So do
            outputs after NMS, which may be in the graph of every family.

    Raises:
        UserError: the outputs fit no family, or not the one named.
    """
    named = next((family for family in FAMILIES if family.name == arch), None)
    if named is not None:
        if named.fits(shapes):
            return named
        after_nms = next((family for family in _WITH_NMS if all(shapes.values()) and family.fits(shapes)), None)
        if after_nms is None:
            raise _no_fit(where, shapes, named)
        return after_nms
    fitting = [family for family in FAMILIES if family.fits(shapes)]
    wanted = [family for family in fitting if isinstance(arch, str) and arch.lower() in family.archs]
    if not fitting:
        raise _no_fit(where, shapes, None)
    return (wanted or fitting)[0]


def family_named(name: str, where: str) -> DetectorFamily:
    """Return the family of a name, or of one of PaddleSlim's ``arch`` names.

    Args:
        name: such as ``yolo`` or ``YOLOv5``.
        where: file and key, for messages.

    Raises:
        UserError: there is no such family.
    """
    names = [family.name for family in FAMILIES]
    if name in names:
        return FAMILIES[names.index(name)]
    for family in FAMILIES:
        if name.lower() in family.archs:
            return family
    raise UserError(f"{where} is {name!r}, expected one of {', '.join(names)}{suggest(name, names)}")


def family_of_file(name: str) -> DetectorFamily | None:
    """Return the family that an ONNX file of this package states; None: there is no such family."""
    return next((family for family in FAMILIES if family.name == name), None)


def _no_fit(where: Path, shapes: Shapes, family: DetectorFamily | None) -> UserError:
    gives = f"{where} gives {_shown(shapes)}"
    others = [entry.name for entry in FAMILIES if entry.fits(shapes)]
    if family is not None and (others or family is not POST_PROCESS_IN_GRAPH):
        remedy = (
            f"{others[0]} fits: name it (--family, Global.arch, or arch of infer_cfg.yml)"
            if others
            else "no family fits: export the model so that it has the outputs of one (docs/import.md)"
        )
        return UserError(f"{gives}, but the family {family.name} has {family.outputs}; {remedy}")
    return UserError(
        f"{gives}, expected bbox [K, 6] and bbox_num [N], or the outputs of {', '.join(e.name for e in FAMILIES[1:])}; "
        "export the model so that it has them (docs/import.md), an RT-DETR with its post-process"
    )


def _shown(shapes: Shapes) -> str:
    """Return the outputs of a model for a message: the first ones, without the names that Paddle makes up."""
    found = []
    for name, shape in list(shapes.items())[:_MOST_SHOWN]:
        known = "" if name.startswith("save_infer_model/") else name
        found.append(f"{known} {_dimensions(shape) if shape else ''}".strip() or "an output of unknown shape")
    more = len(shapes) - len(found)
    return (", ".join(found) or "nothing") + (f" and {more} more" if more > 0 else "")


def _dimensions(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
