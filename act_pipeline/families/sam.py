"""Segment Anything: an image encoder and a mask decoder, two models that make masks of boxes together.

The boxes are prompts: a reader gives those of the data set (:attr:`.interface.Geometry.prompts`). Either model can be
the one that an engine runs; ``infer_cfg.yml`` names the other one:

- ``mask_decoder`` of an encoder (family ``sam``): its folder, relative to the encoder's. The decoder runs once for each
  prompt, after the encoder (:func:`act_pipeline.engines.second_stage.with_second_stage`).
- ``image_encoder`` of a decoder (family ``sam_decoder``): the folder of the model that makes its embeddings. The reader
  runs it (:class:`act_pipeline.data.embeddings.Embeddings`), and each prompt is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.families.interface import Detections, Geometry, PostProcess, RawOutputs, Shapes, joined

MASK_DECODER, IMAGE_ENCODER = "mask_decoder", "image_encoder"
# Labels of SAM's prompt encoder for the corners of a box.
_TOP_LEFT, _BOTTOM_RIGHT = 2.0, 3.0
Stage = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class ImageEncoder:
    """Image embeddings [N, C, H, W], from which a mask decoder makes the masks.

    Attributes:
        stage: runs the mask decoder on the arrays of :func:`decoder_inputs`; None: there is none, so that the model can
            be timed and calibrated, but not evaluated.
    """

    name = "sam"
    archs: tuple[str, ...] = ("efficientvit_sam", "efficientvit-sam")
    outputs = "image embeddings [N, C, H, W] alone"
    partner = MASK_DECODER

    def __init__(self, stage: Optional[Stage] = None) -> None:
        self.stage = stage

    def fits(self, shapes: Shapes) -> bool:
        return len(shapes) == 1 and len(next(iter(shapes.values()))) == 4

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        (embeddings,) = outputs.values()
        return np.asarray(embeddings, np.float64).reshape(*embeddings.shape[:2], -1).transpose(0, 2, 1)

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs | None:
        return None

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        (embeddings,) = outputs.values()
        if geometry.prompts is None:
            return joined([np.zeros((0, 6))] * len(embeddings))
        if self.stage is None:
            raise UserError(f"a {self.name} has no masks without its decoder, expected {MASK_DECODER} in infer_cfg.yml")
        images = []
        for image, prompts in enumerate(geometry.prompts):
            given = prompts[np.isfinite(prompts).all(axis=1)]
            made = (self.stage(decoder_inputs(embeddings[image : image + 1], row[None, 1:])) for row in given)
            images.append(
                [_detection(row, *_masks_and_scores(arrays), geometry, image) for row, arrays in zip(given, made)]
            )
        return _with_masks(images)


class MaskDecoder:
    """Mask logits [N, ..., H, W] of N prompts, and as many scores: the estimated IoUs of the masks."""

    name = "sam_decoder"
    archs: tuple[str, ...] = ()
    outputs = "mask logits [N, 1, M, H, W] or [N, M, H, W], and scores [N, 1, M] or [N, M]"
    partner = IMAGE_ENCODER

    def fits(self, shapes: Shapes) -> bool:
        return _roles(shapes) is not None

    def comparable(self, outputs: Mapping[str, np.ndarray], geometry: Geometry) -> np.ndarray:
        masks, _ = _masks_and_scores(outputs)
        return (1 / (1 + np.exp(-np.clip(masks, -60, 60)))).reshape(len(masks), -1, 1)

    def raw(self, shapes: Shapes, num_classes: int | None) -> RawOutputs | None:
        return None

    def decode(self, outputs: Mapping[str, np.ndarray], geometry: Geometry, post: PostProcess) -> Detections:
        masks, scores = _masks_and_scores(outputs)
        if geometry.prompts is None:
            return joined([np.zeros((0, 6))] * len(masks))
        return _with_masks(
            [
                [_detection(geometry.prompts[row, 0], masks[row : row + 1], scores[row : row + 1], geometry, row)]
                for row in range(len(masks))
            ]
        )


def partner_folder(infer_cfg: Mapping[str, Any], folder: Path, key: str) -> Path | None:
    """Return the folder of the other model of a pair; None: ``infer_cfg.yml`` names none.

    Args:
        infer_cfg: content of the file.
        folder: where it lies, to which the path in it is relative.
        key: :data:`MASK_DECODER` or :data:`IMAGE_ENCODER`.

    Raises:
        UserError: the value is no path.
    """
    value = infer_cfg.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise UserError(f"{folder}: {key} of infer_cfg.yml is {value!r}, expected the path of a model folder")
    return folder / value


def decoder_inputs(embeddings: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of a mask decoder, by the names of decoders that take boxes and of those that take points.

    Args:
        embeddings: [N, C, H, W], one for each prompt.
        boxes: [N, 4], x1, y1, x2, y2 in pixels of the encoder's input.

    Returns:
        ``image_embeddings`` [N, C, H, W], ``boxes`` [N, 1, 4], ``point_coords`` [N, 2, 2], ``point_labels`` [N, 2].
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    labels = np.tile(np.array([_TOP_LEFT, _BOTTOM_RIGHT], np.float32), (len(boxes), 1))
    return {
        "image_embeddings": embeddings,
        "boxes": boxes[:, None],
        "point_coords": boxes.reshape(-1, 2, 2),
        "point_labels": labels,
    }


def _roles(shapes: Shapes) -> tuple[str, str] | None:
    """Return the names of masks and scores; None: there is no such pair."""
    if len(shapes) != 2:
        return None
    masks, scores = sorted(shapes, key=lambda name: -len(shapes[name]))
    fits = len(shapes[masks]) in (4, 5) and shapes[masks][:-2] == shapes[scores]
    return (masks, scores) if fits else None


def _masks_and_scores(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mask logits [N, M, H, W] and scores [N, M], float32.

    Raises:
        UserError: the outputs are not those of a mask decoder.
    """
    roles = _roles({name: np.shape(array) for name, array in outputs.items()})
    if roles is None:
        found = ", ".join(f"{name} {list(np.shape(array))}" for name, array in outputs.items())
        raise UserError(f"the {MASK_DECODER} gives {found}, expected {MaskDecoder.outputs}")
    masks, scores = (np.asarray(outputs[name], np.float32) for name in roles)
    count = len(masks)
    return masks.reshape(count, -1, *masks.shape[-2:]), scores.reshape(count, -1)


def _detection(
    prompt: np.ndarray, masks: np.ndarray, scores: np.ndarray, geometry: Geometry, image: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the row of one prompt, float64 [6], and its mask as COCO's run lengths.

    Args:
        prompt: [5]: class index, x1, y1, x2, y2 in pixels of the input.
        masks: logits [1, M, H, W]; that with the best score is taken.
        scores: [1, M].
        geometry: where the images lie on the input.
        image: position of the image.
    """
    best = int(scores[0].argmax())
    mask = _in_original(masks[0, best], geometry, image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    else:
        box = geometry.to_original(prompt[None, 1:], image, clip=True)[0]
    return np.array([prompt[0], scores[0, best], *box]), run_lengths(mask)


def _in_original(logits: np.ndarray, geometry: Geometry, image: int) -> np.ndarray:
    """Return a mask, bool [height, width] of the original image; logits are enlarged bilinearly, above 0 is inside."""
    import cv2

    height, width = geometry.input_size
    top, left = (round(float(value)) for value in geometry.pad_offset[image])
    inner_height, inner_width = (round(float(value)) for value in geometry.im_shape[image])
    original = tuple(
        max(round(float(size / scale)), 1)
        for size, scale in zip(geometry.im_shape[image], geometry.scale_factor[image])
    )
    enlarged = cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR)
    enlarged = enlarged[top : top + inner_height, left : left + inner_width]
    if enlarged.shape != original:
        enlarged = cv2.resize(enlarged, original[::-1], interpolation=cv2.INTER_LINEAR)
    inside: np.ndarray = enlarged > 0
    return inside


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask, bool [H, W], as COCO's compressed run lengths: ``size`` and ``counts`` (text)."""
    from pycocotools import mask as coco_mask

    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(edge) for edge in found["size"]], "counts": found["counts"].decode("ascii")}


def _with_masks(images: Sequence[Sequence[tuple[np.ndarray, dict[str, Any]]]]) -> Detections:
    rows = [np.array([row for row, _ in image], np.float64).reshape(-1, 6) for image in images]
    return joined(rows)._replace(masks=[mask for image in images for _, mask in image])


FAMILY = ImageEncoder()
DECODER_FAMILY = MaskDecoder()
