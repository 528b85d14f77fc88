"""The NMS at the end of a Paddle program: cut out of the graph, or taken from the model's description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.families.interface import PostProcess
from act_pipeline.families.registry import Decoder, decoder_of
from act_pipeline.onnx_export.float_ops.rules import CannotLower
from act_pipeline.onnx_export.program import Op, Source

# none: boxes and scores are the outputs; onnx: NonMaxSuppression; tensorrt: the plugin EfficientNMS_TRT.
NMS_MODES = ("none", "onnx", "tensorrt")
# Key of the metadata of an ONNX file whose outputs need more than their shapes to become detections.
METADATA_KEY = "act_pipeline.detections"
NMS_OP = "multiclass_nms3"
_APPENDABLE = ("ppyoloe", "yolo")


@dataclass(frozen=True)
class Suppression:
    """What NMS needs to know of a model.

    Attributes:
        family: name of the family whose outputs are before the NMS, ``ppyoloe`` or ``yolo``.
        post: thresholds.
        on_input: whether boxes are in pixels of the network's input; otherwise of the original image.
    """

    family: str
    post: PostProcess
    on_input: bool

    def metadata(self, mode: str) -> dict[str, Any]:
        """Return what an ONNX file states about its outputs.

        Args:
            mode: one of :data:`NMS_MODES`.
        """
        after = "nms_on_input" if self.on_input else "nms_on_original"
        return {"family": self.family if mode == "none" else after, "post": asdict(self.post)}


def decoder_metadata(text: str) -> tuple[str, PostProcess] | None:
    """Return family and thresholds that an ONNX file states; None: they are not of this package.

    Args:
        text: value of :data:`METADATA_KEY`.
    """
    try:
        stated = json.loads(text)
        return str(stated["family"]), PostProcess(**stated["post"])
    except (ValueError, KeyError, TypeError):
        return None


def cut_nms(source: Source, op: Op) -> Suppression:
    """Remove the NMS, and what follows it, from a program that ends with it; the outputs are then boxes and scores.

    Args:
        source: the program, changed in place: outputs are ``boxes [N, A, 4]`` and ``scores [N, C, A]``.
        op: its op of the type :data:`NMS_OP`.

    Returns:
        the thresholds of the op.

    Raises:
        CannotLower: the NMS is not at the end, is of boxes of several images in one list, or its threshold is adaptive.
    """
    if not _ends_with(source, op):
        raise CannotLower("the program has outputs that are not behind it, so that it cannot be left out")
    boxes, scores = op.input("BBoxes"), op.input("Scores")
    if "RoisNum" in op.inputs or len(source.shapes[boxes]) != 3 or len(source.shapes[scores]) != 3:
        raise CannotLower("its boxes are those of all images in one list, expected [N, A, 4]")
    post = _thresholds(op.attrs)
    source.outputs[:] = [boxes, scores]
    source.exposed.update({boxes: "boxes", scores: "scores"})
    needed, kept = set(source.outputs), []
    for each in reversed(source.ops):
        if each is not op and any(name in needed for names in each.outputs.values() for name in names):
            needed.update(name for names in each.inputs.values() for name in names)
            # An op reads a rounded tensor under the name of its dequantized one.
            needed.update(source.quantized[name].source for name in list(needed) if name in source.quantized)
            kept.append(each)
    source.ops[:] = kept[::-1]
    return Suppression("ppyoloe", post, on_input=False)


def described_suppression(model: InferenceModel, source: Source, mode: str) -> Suppression:
    """Return what NMS needs for a model that ends before it.

    Args:
        model: the model; its ``infer_cfg.yml`` has the thresholds.
        source: its program.
        mode: ``onnx`` or ``tensorrt``, for the message.

    Raises:
        UserError: the model is of a family that has no NMS, or has it in the graph.
    """
    decoder: Decoder = decoder_of(model, {name: source.shapes[name] for name in source.outputs})
    if decoder.family.name not in _APPENDABLE:
        raise UserError(
            f"{model.directory}: --nms {mode} appends NMS to models that end before it (families "
            f"{' and '.join(_APPENDABLE)}), found {decoder.family.outputs}; leave --nms out"
        )
    return Suppression(decoder.family.name, decoder.post, decoder.family.name == "yolo" or len(source.outputs) == 1)


def _thresholds(attrs: Mapping[str, Any]) -> PostProcess:
    """Return the thresholds of the op; Paddle does not clip.

    Raises:
        CannotLower: the threshold is adaptive.
    """
    if float(attrs.get("nms_eta", 1.0)) < 1:
        raise CannotLower(f"its nms_eta is {attrs['nms_eta']:.3g}, expected 1 (a fixed threshold)")
    return PostProcess(
        # Attributes are float32 in Paddle: the nearest number with seven digits is what the user wrote.
        score_threshold=_as_written(attrs.get("score_threshold", 0.0)),
        nms_threshold=_as_written(attrs.get("nms_threshold", 0.3)),
        nms_top_k=int(attrs["nms_top_k"]),
        keep_top_k=int(attrs["keep_top_k"]),
        clip=False,
        normalized=bool(attrs.get("normalized", True)),
        background_label=int(attrs.get("background_label", 0)),
    )


def _as_written(number: float) -> float:
    return float(f"{number:.7g}")


def _ends_with(source: Source, op: Op) -> bool:
    """Return whether every output of the program depends on an op."""
    after = {name for names in op.outputs.values() for name in names}
    for other in source.ops:
        if any(name in after for names in other.inputs.values() for name in names):
            after.update(name for names in other.outputs.values() for name in names)
    return all(name in after for name in source.outputs)
