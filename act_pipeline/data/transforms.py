"""Preprocessing: the transforms of a reader, created and applied by ``ppdet``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from act_pipeline.config.schema import Source
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.paddledet import import_ppdet
from act_pipeline.data.padding import PADDING, padding_above_and_left
from act_pipeline.data.pillow_resize import PILLOW_FILTERS, pillow_resize
from act_pipeline.data.prompts import on_input
from act_pipeline.families.interface import PROMPTS

# DecodeCache unpickles files from a configurable folder; the others write images to a folder.
_REFUSED = ("DecodeCache", "DebugVisibleImage", "VisibleRBox")
# Arrays of a batch and their dtypes: the inputs of an exported RT-DETR, and the position of the image on its padding.
INPUTS = {"image": np.float32, "im_shape": np.float32, "scale_factor": np.float32, "pad_offset": np.float32}


class UnreadableImage(Exception):
    """An image file that is missing, cannot be decoded, or is too narrow to be resized with its aspect ratio.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class Preprocess:
    """A reader's transforms, from an image file to the arrays of one sample and of a batch.

    The only difference from ppdet's ``Compose`` is the errors: a file that cannot be decoded raises
    :class:`UnreadableImage`, any other failure a :class:`UserError` that names the transform.
    """

    def __init__(
        self,
        sample_transforms: Sequence[dict[str, Any]],
        batch_transforms: Sequence[dict[str, Any]],
        num_classes: int,
        source: Source,
        section: str,
        constants: Mapping[str, np.ndarray] = MappingProxyType({}),
        derived: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        """Create the transforms.

        Args:
            sample_transforms, batch_transforms: ``{name: arguments}`` each.
            num_classes: number of classes, for transforms that use it.
            source: the reader file, for messages.
            section: ``EvalReader`` or ``TestReader``, for messages.
            constants: name -> array [1, ...] that every batch holds, repeated for each of its images.
            derived: returns further arrays of a batch, computed from its other ones.

        Raises:
            UserError: the first transform is not Decode, or ppdet has no such transform or rejects its arguments.
        """
        self._where = source.locate(f"{section}.sample_transforms")
        self._constants, self._derived = constants, derived
        first = next(iter(sample_transforms[0]))
        if not first.startswith("Decode"):
            raise UserError(f"{self._where} begin with {first}, expected Decode, which reads the image; add it")
        self._sample_transforms = [
            _make(step, num_classes, source, f"{section}.sample_transforms[{index}]")
            for index, step in enumerate(sample_transforms)
        ]
        self._batch_transforms = [
            _make(step, num_classes, source, f"{section}.batch_transforms[{index}]")
            for index, step in enumerate(batch_transforms)
        ]

    def sample(
        self,
        image_file: str | Path,
        image_id: int,
        prompts: Sequence[Sequence[float]] = (),
        prompt_rows: int = 0,
    ) -> dict[str, Any]:
        """Read and transform one image.

        Args:
            image_file: the file.
            image_id: its COCO id.
            prompts: boxes to segment: class index, x1, y1, x2, y2 in pixels of the image.
            prompt_rows: number of rows of ``prompts`` of every sample; 0: there are none.

        Returns:
            ``image`` float32 [3, H, W], ``im_shape`` [2] (height and width of the resized image in pixels, without
            padding), ``scale_factor`` [2] (resized size / original size, y then x), ``pad_offset`` [2] (pixels of
            padding above and left of the image), ``im_id`` int64 [1], ``prompts`` float32 [prompt_rows, 5]
            (see :func:`act_pipeline.data.prompts.on_input`), and other entries of the transforms.

        Raises:
            UnreadableImage: the file is missing or not an image.
            UserError: a transform fails.
        """
        sample: dict[str, Any] = {"im_file": str(image_file), "im_id": np.array([image_id], np.int64)}
        pad_offset = np.zeros(2, np.float32)
        for index, (name, transform) in enumerate(self._sample_transforms):
            try:
                sample = transform(sample)
            except Exception as error:  # ppdet and cv2 raise exceptions of any type
                if index == 0:
                    reason = error.strerror if isinstance(error, OSError) else "it cannot be decoded as an image"
                    raise UnreadableImage(image_file, reason or type(error).__name__) from None
                if "dsize.empty()" in str(error):  # cv2's message for an empty result
                    height, width = np.shape(sample["image"])[:2]
                    raise UnreadableImage(image_file, f"{name} leaves nothing of {height} x {width} pixels") from None
                message = f"{self._where}: {name} fails on {image_file}: {_line(error)}; correct its arguments"
                raise UserError(message) from None
            if not isinstance(sample, dict):
                raise UserError(f"{self._where}: {name} gives {type(sample).__name__}, expected a sample; take it out")
            if name in PADDING and "im_shape" in sample:
                pad_offset = pad_offset + padding_above_and_left(name, transform, sample["image"], sample["im_shape"])
        sample["pad_offset"] = pad_offset
        for key in (*INPUTS, "im_id"):
            if key not in sample:
                raise UserError(f"{self._where} give no '{key}', expected Decode first and Resize after it; add them")
        if prompt_rows:
            sample[PROMPTS] = on_input(prompts, sample, prompt_rows)
        return sample

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Apply the batch transforms and stack the samples.

        Returns:
            float32 ``image`` [N, 3, H, W], ``im_shape``, ``scale_factor``, ``pad_offset`` [N, 2]; int64 ``im_id`` [N];
            ``prompts`` [N, P, 5] if the samples have them; the constants; the derived arrays.

        Raises:
            UserError: a transform fails, or the samples cannot be stacked.
        """
        for name, transform in self._batch_transforms:
            try:
                samples = transform(samples)
            except Exception as error:
                message = f"{self._where}: {name} fails on a batch: {_line(error)}; correct its arguments"
                raise UserError(message) from None
            if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
                raise UserError(f"{self._where}: {name} gives {type(samples).__name__}, expected samples; take it out")
        try:
            arrays = self._stack(samples)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            message = f"{self._where} give samples that make no batch ({_line(error)}); take out what ppdet trains with"
            raise UserError(message) from None
        return arrays if self._derived is None else {**arrays, **self._derived(arrays)}

    def _stack(self, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        shapes = {np.shape(sample["image"]) for sample in samples}
        if len(shapes) > 1 or not all(len(shape) == 3 and shape[0] == 3 for shape in shapes):
            raise UserError(
                f"{self._where} give images of the shapes {sorted(shapes)}, expected [3, height, width], the same for "
                "a whole batch; end with Permute, and use Resize with keep_ratio: False or a batch_size of 1"
            )
        arrays = {}
        for key, kind in INPUTS.items():
            # Permute returns a transposed view, whose memory layout np.stack alone would keep.
            arrays[key] = np.empty((len(samples), *np.shape(samples[0][key])), kind)
            np.stack([sample[key] for sample in samples], out=arrays[key])
        arrays["im_id"] = np.concatenate([sample["im_id"] for sample in samples])
        if PROMPTS in samples[0]:
            arrays[PROMPTS] = np.stack([sample[PROMPTS] for sample in samples])
        arrays.update(repeated(self._constants, len(samples)))
        return arrays


def repeated(constants: Mapping[str, np.ndarray], images: int) -> dict[str, np.ndarray]:
    """Return constant inputs [1, ...] as those of a batch, [N, ...]."""
    return {name: np.repeat(array, images, axis=0) for name, array in constants.items()}


def _make(step: dict[str, Any], num_classes: int, source: Source, name: str) -> tuple[str, Any]:
    transforms = import_ppdet("ppdet.data.transform")
    ((kind, arguments),) = step.items()
    known = sorted(
        candidate
        for candidate in dir(transforms)
        if inspect.isclass(found := getattr(transforms, candidate))
        and issubclass(found, transforms.BaseOperator)
        and found is not transforms.BaseOperator
        and candidate not in _REFUSED
    )
    if kind not in known:
        raise UserError(
            f"{source.locate(name)} is {kind}, which is no transform of ppdet, expected one such as Decode, Resize, "
            f"NormalizeImage, Permute{suggest(kind, known)}"
        )
    operator = getattr(transforms, kind)
    arguments = copy.deepcopy(arguments or {})
    parameters = [parameter for parameter in inspect.signature(operator.__init__).parameters if parameter != "self"]
    for argument in arguments:
        if argument not in parameters:
            expected = f"expected one of {', '.join(parameters)}" if parameters else "it takes none"
            raise UserError(
                f"{source.locate(f'{name}.{kind}')}.{argument} is not an argument of {kind}, {expected}"
                f"{suggest(argument, parameters)}"
            )
    interp = arguments.get("interp")
    if kind == "Resize" and isinstance(interp, str):
        if interp not in PILLOW_FILTERS:
            raise UserError(
                f"{source.locate(f'{name}.{kind}')}.interp is {interp!r}, expected a number of OpenCV (1: bilinear, 2: "
                f"bicubic) or one of {', '.join(PILLOW_FILTERS)}{suggest(interp, PILLOW_FILTERS)}"
            )
        operator = pillow_resize
    try:
        made = operator(**arguments)
    except Exception as error:
        where = source.locate(f"{name}.{kind}")
        raise UserError(f"{where} is refused by ppdet: {_line(error)}; correct its arguments") from None
    if hasattr(made, "num_classes"):
        made.num_classes = num_classes
    return kind, made


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
