"""What a detector family answers, and the data that decoding needs besides the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Protocol, runtime_checkable

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.families.prompt import Prompt

# Output name -> shape in the model's order; -1: a dynamic dimension; (): the shape is not known.
Shapes = Mapping[str, tuple[int, ...]]
PROMPTS = "prompts"  # of a reader's batch, see `Geometry.prompts`
# Keys of the `NMS` section of infer_cfg.yml and their expected values; all but `clip` are PaddleDetection's.
_COUNT, _SHARE, _FLAG = "a positive integer, or -1 for all", "a number from 0 to 1", "true or false"
_CLASS = "the index of a class, or -1 for none"
NMS_KEYS = {
    "score_threshold": _SHARE, "nms_threshold": _SHARE, "nms_top_k": _COUNT, "keep_top_k": _COUNT,
    "clip": _FLAG, "normalized": _FLAG, "background_label": _CLASS,
}  # fmt: skip


class Detections(NamedTuple):
    """Detections of a batch, in the form of :meth:`act_pipeline.engines.interface.Engine.run`.

    Attributes:
        bbox: float32 [K, 6]: class index, score, x1, y1, x2, y2 in pixels of the original image, image 0 first.
        bbox_num: int32 [N]: number of rows of each image.
        masks: mask of each row on the original image, COCO's compressed run lengths; None: of a family without masks.
    """

    bbox: np.ndarray
    bbox_num: np.ndarray
    masks: Optional[list[dict[str, Any]]] = None


@dataclass(frozen=True)
class PostProcess:
    """Thresholds of the post-process outside the graph.

    Attributes:
        score_threshold: detections with lower scores are dropped, in [0, 1].
        nms_threshold: IoU above which the detection with the lower score is dropped, in (0, 1].
        nms_top_k: number of detections of a class that NMS considers, those with the highest scores; -1: all.
        keep_top_k: number of detections an image that are returned; -1: all.
        clip: whether boxes are clipped to the original image.
        num_classes: number of classes, where ``label_list`` names them; None: not known.
        normalized: if False, boxes are in pixels and contain their last row and column, as in ``multiclass_nms3``.
        background_label: index of a class that is not returned; -1: there is none.
        class_tokens: positions of the tokens of each class in the prompt; empty for a model without text.
    """

    score_threshold: float = 0.001
    nms_threshold: float = 0.7
    nms_top_k: int = 1000
    keep_top_k: int = 300
    clip: bool = True
    num_classes: int | None = None
    normalized: bool = True
    background_label: int = -1
    class_tokens: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, infer_cfg: Mapping[str, Any], where: str) -> PostProcess:
        """Read the sections ``NMS`` (in PaddleDetection's form) and ``prompt`` of an ``infer_cfg.yml``.

        Missing keys of ``NMS`` take defaults.

        Args:
            infer_cfg: content of the file.
            where: its path, for messages.

        Raises:
            UserError: a value has the wrong type or range.
        """
        section = infer_cfg.get("NMS") or {}
        if not isinstance(section, Mapping):
            raise UserError(f"{where}: NMS is {section!r}, expected a mapping with {', '.join(NMS_KEYS)}")
        values: dict[str, Any] = {key: section[key] for key in NMS_KEYS if key in section}
        for key, value in values.items():
            if not _is_valid(value, NMS_KEYS[key]):
                raise UserError(f"{where}: NMS.{key} is {value!r}, expected {NMS_KEYS[key]}; correct it")
        labels = infer_cfg.get("label_list")
        prompt = Prompt.of(infer_cfg, where)
        if prompt is not None:
            values["class_tokens"] = tuple(prompt.classes.values())
        return cls(**values, num_classes=len(labels) if isinstance(labels, list) and labels else None)


def _is_valid(value: object, expected: str) -> bool:
    if isinstance(value, bool):
        return expected == _FLAG
    if expected == _COUNT:
        return isinstance(value, int) and (value == -1 or value > 0)
    if expected == _CLASS:
        return isinstance(value, int) and value >= -1
    return expected == _SHARE and isinstance(value, (int, float)) and 0 <= value <= 1


@dataclass(frozen=True)
class Geometry:
    """Where the original images lie on the network's input.

    Attributes:
        input_size: height and width of the input in pixels.
        scale_factor: [N, 2], input pixels per original pixel, y then x.
        im_shape: [N, 2], height and width of the resized image without padding, in pixels of the input.
        pad_offset: [N, 2], pixels of padding above and left of the image.
        prompts: [N, P, 5], boxes to segment: class index, x1, y1, x2, y2 in pixels of the input; NaN fills the rows of
            images with fewer boxes. None: there are none.
    """

    input_size: tuple[int, int]
    scale_factor: np.ndarray
    im_shape: np.ndarray
    pad_offset: np.ndarray
    prompts: Optional[np.ndarray] = None

    @classmethod
    def of(cls, inputs: Mapping[str, np.ndarray], images: int) -> Geometry:
        """Read the geometry from a reader's batch.

        Args:
            inputs: a batch. Without ``image`` the input counts as 1 x 1 pixels; without ``scale_factor`` the image
                counts as not resized, without ``im_shape`` as filling the input, without ``pad_offset`` as placed at
                the top left.
            images: number of images N.
        """
        shape = np.shape(inputs["image"])[2:] if "image" in inputs else (1, 1)
        size = (int(shape[0]), int(shape[1]))
        default = {"scale_factor": (1.0, 1.0), "im_shape": size, "pad_offset": (0.0, 0.0)}
        arrays = {
            name: np.asarray(inputs[name] if name in inputs else np.tile(value, (images, 1)), np.float32)
            for name, value in default.items()
        }
        return cls(size, **arrays, prompts=inputs.get(PROMPTS))

    def to_original(self, boxes: np.ndarray, image: int, clip: bool) -> np.ndarray:
        """Convert boxes from pixels of the input to pixels of the original image.

        Args:
            boxes: [K, 4], x1, y1, x2, y2.
            image: position in the batch.
            clip: whether to clip them to the original image.
        """
        (scale_y, scale_x), (top, left) = self.scale_factor[image], self.pad_offset[image]
        height, width = self.im_shape[image]
        moved: np.ndarray = boxes - np.array([left, top, left, top], np.float32)
        limits = np.array([width, height, width, height], np.float32)
        moved = np.clip(moved, 0, limits) if clip else moved
        return moved / np.array([scale_x, scale_y, scale_x, scale_y], np.float32)

    def clipped(self, boxes: np.ndarray, image: int) -> np.ndarray:
        """Return boxes [K, 4], x1, y1, x2, y2 in pixels of the original image, clipped to it."""
        width_and_height = self.im_shape[image, ::-1] / self.scale_factor[image, ::-1]
        return np.clip(boxes, 0, np.tile(width_and_height, 2))


class Part(NamedTuple):
    """A slice of an output [N, ., .] along its axis of classes or coordinates.

    Attributes:
        output: name of the output.
        axis: 1 or 2.
        start: first index along the axis.
        end: index after the last one; None: all from ``start`` on.
    """

    output: str
    axis: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class RawOutputs:
    """Which parts of a model's outputs are its scores and boxes, before NMS or the choice of the best.

    Attributes:
        scores: C scores of each of the A rows.
        boxes: four numbers of each row.
        objectness: one number of each row, which multiplies its scores; None: there is none.
        logits: whether ``scores`` are before the sigmoid.
        corners: whether ``boxes`` are x1, y1, x2, y2; otherwise centre x, centre y, width, height.
        pixels: whether ``boxes`` are in pixels; otherwise they are relative to the input.
    """

    scores: Part
    boxes: Part
    objectness: Part | None = None
    logits: bool = False
    corners: bool = False
    pixels: bool = True


class DetectorFamily(Protocol):
    """A family of detectors whose models have outputs of the same form.

    Attributes:
        name: value of ``Global.arch`` and of ``arch`` in ``infer_cfg.yml`` that selects the family.
        archs: other values of ``arch`` that select it, in lower case (PaddleDetection's and PaddleSlim's names).
        outputs: the outputs in words, for messages.
    """

    name: str
    archs: tuple[str, ...]
    outputs: str

    def fits(self, shapes: Shapes) -> bool:
        """Return whether a model with these outputs can be of the family."""

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray | None:
        """Return the outputs in a form whose differences are errors of the detections, for the SQNR.

        Returns:
            [N, rows, C + 4], see :func:`weighted`; None: the outputs are detections, in which rows have no fixed place.
        """

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs | None:
        """Return where scores and boxes are in the outputs of a model that fits.

        Args:
            shapes: the outputs.
            num_classes: number of classes; None: not known.

        Returns:
            Their parts; None: the outputs are detections.
        """

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        """Turn the outputs of a batch into detections.

        Args:
            outputs: name -> array, in the model's order.
            geometry: where the images lie on the input.
            post: thresholds.
        """


@runtime_checkable
class PairedFamily(Protocol):
    """A :class:`DetectorFamily` whose models work in pairs.

    Attributes:
        partner: key of ``infer_cfg.yml`` with the folder of the other model.
    """

    partner: str


def weighted(scores: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the scores, and the boxes multiplied by their best score, so that boxes with low scores count little.

    Args:
        scores: [N, rows, C], in [0, 1].
        boxes: [N, rows, 4], relative to the input.

    Returns:
        float64 [N, rows, C + 4].
    """
    scores = np.asarray(scores, np.float64)
    return np.concatenate([scores, boxes * scores.max(axis=2, keepdims=True)], axis=2)


def joined(images: Sequence[np.ndarray]) -> Detections:
    """Return the detections of a batch from those of its images, [K, 6] each."""
    rows = [np.asarray(image, np.float32).reshape(-1, 6) for image in images]
    bbox = np.concatenate(rows) if rows else np.zeros((0, 6), np.float32)
    return Detections(bbox, np.array([len(image) for image in rows], np.int32))
