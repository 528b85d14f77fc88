"""The pictures that an imported model is compared on, prepared as the usual reader of its family prepares them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.families import end2end, grounding_dino, nms_in_file, sam, yolo
from act_pipeline.families.interface import DetectorFamily

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_PIXELS = 255.0
_GREY = 114
_LARGEST_SCENE = 640
_Three = tuple[float, float, float]


@dataclass(frozen=True)
class Preparation:
    """From a picture to the input of a model, as in the readers of ``configs/readers``.

    Attributes:
        words: for users.
        keep_ratio: the picture keeps its ratio and is centred on grey; else it is stretched to the input.
        mean, std: of the pixels / 255, RGB.
    """

    words: str
    keep_ratio: bool = False
    mean: _Three = (0.0, 0.0, 0.0)
    std: _Three = (1.0, 1.0, 1.0)

    def __call__(self, picture: np.ndarray, size: Sequence[int], dtype: str = "float32") -> np.ndarray:
        """Return the input of a picture, [3, H, W].

        Args:
            picture: uint8 [H, W, 3], BGR.
            size: height and width of the input in pixels.
            dtype: of the input; an integer type takes the pixels as they are.
        """
        import cv2

        height, width = size
        if self.keep_ratio:
            scale = min(height / picture.shape[0], width / picture.shape[1])
            inner = [max(round(side * scale), 1) for side in picture.shape[:2]]
            top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
            resized = np.full((height, width, 3), _GREY, np.uint8)
            resized[top : top + inner[0], left : left + inner[1]] = cv2.resize(picture, (inner[1], inner[0]))
        else:
            resized = cv2.resize(picture, (width, height))
        pixels = np.ascontiguousarray(resized[:, :, ::-1].transpose(2, 0, 1))
        if np.dtype(dtype).kind != "f":
            return pixels.astype(dtype)
        mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.astype(np.float32) / np.float32(_PIXELS) - mean) / std).astype(dtype)


STRETCHED = Preparation("stretched to the input")
_CENTRED = Preparation("ratio kept, centred on grey", keep_ratio=True)
_BY_FAMILY = {
    **{family.name: _CENTRED for family in (yolo.FAMILY, end2end.FAMILY, *nms_in_file.FAMILIES)},
    grounding_dino.FAMILY.name: Preparation(
        "stretched, ImageNet's mean and deviation", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    sam.FAMILY.name: Preparation(
        "stretched, mean 0.5 and deviation 0.25", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    ),
}


def preparation_of(family: DetectorFamily | None) -> Preparation:
    """Return how the reader of a family prepares pictures; None: of no family."""
    return STRETCHED if family is None else _BY_FAMILY.get(family.name, STRETCHED)


@dataclass(frozen=True)
class Pictures:
    """Pictures to compare a model on.

    Attributes:
        words: what they are, for users, in the plural.
        take: index, longer side of the input in pixels -> picture, uint8 [H, W, 3], BGR.
    """

    words: str
    take: Callable[[int, int], np.ndarray]

    @classmethod
    def of(cls, images: str | Path | None) -> Pictures:
        """Return the pictures of a folder, the one picture, or without either the scenes of the built-in sample.

        Raises:
            UserError: there is no picture.
        """
        if images is None:
            return cls("scenes of the built-in sample", _scene)
        found = check_pictures(images)
        return cls(f"pictures of {images}", lambda index, side: _read(found[index % len(found)]))


@functools.lru_cache(maxsize=8)
def _scene(index: int, side: int) -> np.ndarray:
    """Return a scene of the built-in sample: digits on a part of a photograph, or on a texture."""
    from act_pipeline.data.builtin_sample import MIN_SIZE, make_scene

    return make_scene("val", 0, index, min(max(side, MIN_SIZE), _LARGEST_SCENE)).image


def check_pictures(images: str | Path) -> list[Path]:
    """Return the pictures of a folder, or the one picture.

    Raises:
        UserError: there is none.
    """
    place = Path(images)
    found = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    found = [path for path in found if path.suffix.lower() in _SUFFIXES]
    if not place.exists():
        raise UserError(f"{place} does not exist, expected a folder with pictures, or one; give another --images")
    if not found:
        raise UserError(
            f"{place} {'holds no pictures' if place.is_dir() else 'is no picture'}, "
            "expected a folder with .jpg, .png or .bmp files; give another --images"
        )
    return found


def _read(path: Path) -> np.ndarray:
    import cv2

    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(f"{path} is no picture that OpenCV can read")
    return picture
