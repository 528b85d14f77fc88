"""``Distillation.loss: detection`` for detectors without a query selection: compare scores and boxes row by row.

Scores and boxes are taken before NMS, where row i belongs to the same place of the image in both models: from the
outputs, as the model's family (`act_pipeline.families`) names them, or from the inputs of the NMS op in the graph. The
loss is that of `compress.qat.detection_loss` without the encoder's scores. Scores after a sigmoid are converted to
logits, and boxes to centre and size relative to the network's input.

A DETR of which only the outputs are known selects queries too: its gathers then read the teacher's indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.compress.paddleslim.prefixes import LOSS_PREFIX
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.families.interface import Part, RawOutputs
from act_pipeline.families.registry import decoder_for
from act_pipeline.graph.detr_structure import DetrStructure
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import static_mode

# Ops that take boxes [N, A, 4] (x1, y1, x2, y2) and scores [N, C, A] and have no gradient.
_NMS = ("multiclass_nms3", "multiclass_nms2", "multiclass_nms", "matrix_nms")
# Scores are moved into [SOFT, 1 - SOFT] before their logits are taken, so that gradients are finite where a sigmoid in
# float32 is 0 or 1. Detections have higher scores than this.
_SOFT = 1e-4


@dataclass(frozen=True)
class RawTensors:
    """The compared tensors of a model.

    Attributes:
        parts: which parts of which tensors are scores and boxes.
        image: name of the network's input [N, 3, H, W].
        sizes: number of rows and of classes, -1: dynamic.
        queries: int64 [N, Q], the positions that a DETR selects; None: the model selects none.
    """

    parts: RawOutputs
    image: str
    sizes: tuple[int, int]
    queries: Optional[str] = None

    @property
    def taught(self) -> tuple[str, ...]:
        """Names of the compared tensors, each once."""
        parts = (self.parts.scores, self.parts.boxes, self.parts.objectness)
        return tuple(dict.fromkeys(part.output for part in parts if part is not None))


def find_raw_tensors(config: Config, model: InferenceModel) -> Optional[RawTensors]:
    """Return scores and boxes of a float model before its NMS; None: the graph has none that can be compared.

    Args:
        config: ``Global.arch`` names the family, if the model does not tell.
        model: the float model, with its ``infer_cfg.yml``.

    Raises:
        UserError: the outputs do not fit the family.
    """
    import paddle

    summary = inspect_model(model)
    images = [name for name, shape in summary.inputs.items() if len(shape) == 4]
    if not images:
        return None
    decoder = decoder_for(config, model)
    parts = decoder.family.raw(summary.output_shapes, decoder.post.num_classes)
    with static_mode():
        structure = DetrStructure(paddle.static.Program.parse_from_string(model.model_path.read_bytes()))
        queries = None
        if parts is None:
            parts = _before_nms(structure)
        elif parts.logits:
            queries = next((op.output("Indices")[0] for op in structure.query_selections()), None)
        if parts is None:
            return None
        shape = structure.shape(parts.scores.output)
        rows = shape[3 - parts.scores.axis]
    classes = shape[parts.scores.axis] - parts.scores.start
    return RawTensors(parts, images[0], (rows, classes), queries)


def _before_nms(structure: DetrStructure) -> Optional[RawOutputs]:
    for op in structure.ops:
        if op.type in _NMS:
            boxes, scores = op.input("BBoxes")[0], op.input("Scores")[0]
            if len(structure.shape(boxes)) == len(structure.shape(scores)) == 3 and structure.shape(boxes)[2] == 4:
                return RawOutputs(Part(scores, 1), Part(boxes, 2), corners=True)
    return None


def compared(tensors: Mapping[str, Any], parts: RawOutputs, image: Any, side: str) -> dict[str, Any]:
    """Convert outputs to what `compress.qat.detection_loss.detection_loss` compares, in the current program.

    Args:
        tensors: output -> variable.
        parts: where scores and boxes are.
        image: the network's input [N, 3, H, W].
        side: ``teacher`` or ``student``, part of the names of the new variables.

    Returns:
        ``logits`` [N, A, C] and ``boxes`` [N, A, 4]: centre x, centre y, width, height, relative to the input.
    """
    import paddle

    with paddle.utils.unique_name.guard(f"{LOSS_PREFIX}{side}/"):
        scores, boxes = _rows(tensors, parts.scores), _rows(tensors, parts.boxes)
        if parts.logits:
            logits = paddle.clip(scores, -50.0, 50.0)  # minus infinity marks what is no class
        else:
            if parts.objectness is not None:
                scores = scores * _rows(tensors, parts.objectness)
            soft = _SOFT + (1 - 2 * _SOFT) * scores
            logits = paddle.log(soft) - paddle.log(1 - soft)
        if parts.corners:
            low, high = paddle.split(boxes, 2, axis=-1)
            boxes = paddle.concat([(low + high) / 2, high - low], axis=-1)
        return {"logits": logits, "boxes": boxes / _size(image) if parts.pixels else boxes}


def _rows(tensors: Mapping[str, Any], part: Part) -> Any:
    """Return a part of an output as [N, A, numbers]."""
    import paddle

    tensor = tensors[part.output]
    end = tensor.shape[part.axis] if part.end is None else part.end
    if (part.start, end) != (0, tensor.shape[part.axis]):
        tensor = paddle.slice(tensor, [part.axis], [part.start], [end])
    return paddle.transpose(tensor, [0, 2, 1]) if part.axis == 1 else tensor


def _size(image: Any) -> Any:
    """Return the larger side of the input in pixels, a number or a variable [1]."""
    import paddle

    if min(image.shape[2:]) > 0:
        return float(max(image.shape[2:]))
    return paddle.cast(paddle.shape(image)[2:4], "float32").max()
