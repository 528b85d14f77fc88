"""The built-in sample: scenes with real handwritten digits in COCO's form, generated from a seed in seconds.

The digits are the 1,797 scans of 8 x 8 pixels included in scikit-learn (``sklearn.datasets.load_digits``, from the UCI
set "Optical Recognition of Handwritten Digits"). They are enlarged smoothly, rotated slightly, coloured, and placed on
backgrounds: crops of the two photographs included in scikit-learn, or procedural textures. Digits and plain patches
occlude one another.

Training and validation scenes are made in the same way from disjoint sources:

* scans: a fixed quarter of each class (:data:`VALIDATION_SHARE`) is used for validation only;
* photographs: training crops come from the left three fifths of each, validation crops from the right two fifths;
* textures and all other random choices: random streams keyed by ``(seed, split, index)``.

The split of scans and photographs does not depend on the seed, so no model trained with any seed has seen a validation
scan.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.progress import each
from act_pipeline.core.records import read_record, write_record
from act_pipeline.data.dataset import is_hidden

SCHEMA = "act_pipeline.sample/1"
RECORD = "sample.json"
SPLITS = ("train", "val")
CLASS_NAMES = tuple(str(digit) for digit in range(10))
VALIDATION_SHARE = 0.25
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
PHOTOGRAPH_CUT = 0.6
MIN_VISIBLE = 0.4
"""A digit is laid so that at least this share of its ink stays visible; every digit in a scene has a box."""
DIGITS_PER_SCENE = (2, 9)
DIGIT_HEIGHT = (0.09, 0.42)
"""Smallest and largest height of a digit, as a share of the scene's longer side."""
MIN_SIZE = 64
JPEG_QUALITY = 92

_SPLIT_SEED = 20
_RECIPE = 1
"""Goes up when the same parameters give other scenes, so that folders made before are made anew."""


@dataclasses.dataclass
class Scene:
    """One image and its ground truth.

    Attributes:
        image: uint8 [H, W, 3], BGR.
        boxes: float32 [N, 4], ``x1, y1, x2, y2`` in pixels: the bounds of the digit's visible ink.
        labels: int64 [N], the digit, 0 to 9.
        visible: float32 [N], the visible share of the digit's ink, :data:`MIN_VISIBLE` to 1.
        scans: int64 [N], index of the scan in scikit-learn's set.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    visible: np.ndarray
    scans: np.ndarray


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's scans, float32 [1797, 8, 8] from 0 (paper) to 1 (ink), and their classes, int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@functools.cache
def scan_indices(split: str) -> np.ndarray:
    """Return the sorted indices of the scans that ``split`` (``train`` or ``val``) may use, int64 [N]."""
    _, labels = _digits()
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(members) * VALIDATION_SHARE)
        chosen.append(members[:cut] if split == "val" else members[cut:])
    return np.sort(np.concatenate(chosen))


@functools.cache
def background_photographs(split: str) -> tuple[np.ndarray, ...]:
    """Return the part of each photograph that ``split`` may crop, uint8 [H, W, 3], BGR."""
    from sklearn.datasets import load_sample_image

    parts = []
    for name in PHOTOGRAPHS:
        image = load_sample_image(name)[:, :, ::-1]
        cut = int(image.shape[1] * PHOTOGRAPH_CUT)
        parts.append(np.ascontiguousarray(image[:, :cut] if split == "train" else image[:, cut:]))
    return tuple(parts)


def _photograph(rng: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    """Crop a random part of a photograph, float32 [height, width, 3], 0 to 255."""
    parts = background_photographs(split)
    source = parts[rng.integers(len(parts))]
    scale = rng.uniform(0.35, 1.0) * min(source.shape[0] / height, source.shape[1] / width)
    crop_height, crop_width = max(8, int(height * scale)), max(8, int(width * scale))
    top = rng.integers(source.shape[0] - crop_height + 1)
    left = rng.integers(source.shape[1] - crop_width + 1)
    crop = source[top : top + crop_height, left : left + crop_width]
    crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop[:, :, rng.permutation(3)]


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return noise of several scales and stripes, blended between two colours, float32 [height, width, 3]."""
    mix = np.zeros((height, width), np.float32)
    for cells in rng.choice([2, 4, 8, 16, 32, 64], size=3, replace=False):
        grain = rng.random((int(cells) + 1, int(cells) + 1), dtype=np.float32)
        mix += rng.uniform(0.2, 1.0) * cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.4:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 60)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * np.float32(2 * math.pi / period))
        mix += rng.uniform(0.2, 0.8) * (wave if rng.random() < 0.5 else np.sign(wave))
    mix = (mix - mix.min()) / max(float(np.ptp(mix)), 1e-6)
    colours = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    return colours[0] + mix[:, :, None] * (colours[1] - colours[0])


def _digit_alpha(rng: np.random.Generator, scan: np.ndarray, height: float) -> np.ndarray:
    """Enlarge a scan to about ``height`` pixels, rotate and shear it; float32 [h, w] opacity, cropped to its ink."""
    padded = np.pad(scan, 1)
    scale_y = height / 8.0
    scale_x = scale_y * rng.uniform(0.75, 1.2)
    angle, slant = math.radians(rng.uniform(-14, 14)), rng.uniform(-0.2, 0.2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1.0, slant], [0.0, 1.0]]) @ np.diag([scale_x, scale_y])
    side = int(math.ceil(max(scale_x, scale_y) * 15))
    offset = np.full(2, (side - 1) / 2.0) - matrix @ np.full(2, 4.5)
    ink = cv2.warpAffine(padded, np.column_stack([matrix, offset]), (side, side), flags=cv2.INTER_CUBIC)
    alpha = np.clip((ink - 0.2) / 0.4, 0.0, 1.0)
    rows, columns = np.flatnonzero((alpha > 0.5).any(axis=1)), np.flatnonzero((alpha > 0.5).any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _patch_alpha(rng: np.random.Generator, longest: float) -> np.ndarray:
    """Return an opaque shape for occlusion (a bar, a box or an ellipse), float32 [h, w], 0 or 1."""
    height, width = (max(3, int(longest * rng.uniform(0.08, 0.28))) for _ in range(2))
    kind = rng.integers(3)
    if kind == 0:
        return np.ones((max(2, height // 4), width * 2), np.float32)
    if kind == 1:
        return np.ones((height, width), np.float32)
    shape = np.zeros((height, width), np.float32)
    return cv2.ellipse(shape, (width // 2, height // 2), (width // 2, height // 2), 0, 0, 360, 1.0, -1)


class _Canvas:
    """A scene under construction: the image, and for every pixel the index of the topmost digit (-1: no digit)."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.owner = np.full(image.shape[:2], -1, np.int16)
        self.ink: list[int] = []

    def _counts(self, owner: np.ndarray) -> np.ndarray:
        return np.bincount(owner[owner >= 0].ravel(), minlength=len(self.ink))

    def lay(self, alpha: np.ndarray, top: int, left: int, colour: np.ndarray, digit: bool, opacity: float) -> bool:
        """Place a shape unless it or a digit under it would have too little visible ink; return if it was placed."""
        height, width = self.owner.shape
        y1, x1 = max(top, 0), max(left, 0)
        y2, x2 = min(top + alpha.shape[0], height), min(left + alpha.shape[1], width)
        if y2 <= y1 or x2 <= x1:
            return False
        inside = alpha[y1 - top : y2 - top, x1 - left : x2 - left]
        solid = inside > 0.5
        total = int((alpha > 0.5).sum())
        if digit and solid.sum() < MIN_VISIBLE * total:
            return False
        region = self.owner[y1:y2, x1:x2]
        if self.ink:
            left_visible = self._counts(self.owner) - self._counts(region[solid])
            if (left_visible < MIN_VISIBLE * np.asarray(self.ink)).any():
                return False
        region[solid] = len(self.ink) if digit else -1
        if digit:
            self.ink.append(total)
        weight = (inside * opacity)[:, :, None]
        patch = self.image[y1:y2, x1:x2]
        patch += weight * (colour - patch)
        return True


def _ink_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Choose a colour that differs from the mean colour ``under`` it by a random contrast."""
    contrast = rng.uniform(38, 150)
    mean = under.reshape(-1, 3).mean(axis=0)
    grey = float(mean.mean())
    brighter = grey + contrast <= 255 and (rng.random() < 0.5 or grey - contrast < 0)
    colour = np.full(3, grey + contrast if brighter else grey - contrast)
    if rng.random() < 0.6:
        tint = rng.uniform(-60, 60, 3)
        colour = colour + tint - tint.mean()
    return np.clip(colour, 0, 255).astype(np.float32)


def make_scene(split: str, seed: int, index: int, size: int = 256) -> Scene:
    """Generate scene number ``index`` of ``split``; the same arguments give the same scene.

    Args:
        split: ``train`` or ``val``; determines which scans and backgrounds may be used.
        seed: at least 0.
        index: at least 0; there is no upper limit, so that training can use an unlimited number of scenes.
        size: the longer side in pixels; the shorter one is equal to it or three quarters of it.
    """
    rng = np.random.default_rng([_RECIPE, seed, SPLITS.index(split), index])
    short = size * 3 // 4
    height, width = ((size, size), (short, size), (size, short))[rng.integers(3)]
    is_photograph = rng.random() < 0.6
    background = _photograph(rng, split, height, width) if is_photograph else _texture(rng, height, width)
    background = (background - 128) * rng.uniform(0.5, 1.0) + 128 + rng.uniform(-40, 40)
    canvas = _Canvas(np.clip(background, 0, 255).astype(np.float32))
    scans, labels = _digits()
    allowed = scan_indices(split)

    used: list[int] = []
    patches = int(rng.integers(0, 4))
    wanted = int(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1))
    order = rng.permutation([True] * wanted + [False] * patches)
    for is_digit in order:
        scan = int(allowed[rng.integers(len(allowed))])
        for _attempt in range(12):
            if is_digit:
                low, high = np.log(DIGIT_HEIGHT[0] * size), np.log(DIGIT_HEIGHT[1] * size)
                alpha = _digit_alpha(rng, scans[scan], math.exp(rng.uniform(low, high)))
            else:
                alpha = _patch_alpha(rng, size)
            spare_y, spare_x = alpha.shape[0] // 4, alpha.shape[1] // 4
            top = int(rng.integers(-spare_y, max(1, height - alpha.shape[0] + spare_y)))
            left = int(rng.integers(-spare_x, max(1, width - alpha.shape[1] + spare_x)))
            under = canvas.image[max(top, 0) : top + alpha.shape[0], max(left, 0) : left + alpha.shape[1]]
            if not under.size:
                continue
            colour = _ink_colour(rng, under) if is_digit else rng.uniform(0, 255, 3).astype(np.float32)
            if canvas.lay(alpha, top, left, colour, bool(is_digit), rng.uniform(0.8, 1.0) if is_digit else 1.0):
                if is_digit:
                    used.append(scan)
                break

    image = canvas.image
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.1))
    image = image + rng.normal(0, rng.uniform(1, 9), image.shape[:2]).astype(np.float32)[:, :, None]
    boxes, visible = [], []
    for number, total in enumerate(canvas.ink):
        rows, columns = np.nonzero(canvas.owner == number)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        visible.append(len(rows) / total)
    return Scene(
        image=np.clip(np.rint(image), 0, 255).astype(np.uint8),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=labels[used],
        visible=np.asarray(visible, np.float32),
        scans=np.asarray(used, np.int64),
    )


def _write_split(folder: Path, split: str, count: int, seed: int, size: int, progress: bool) -> dict:
    """Write the images of one split under ``folder`` and return its COCO annotations."""
    images_dir = folder / "images" / split
    images_dir.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in each(range(count), f"{split} scenes", "scene", shown=progress):
        scene = make_scene(split, seed, index, size)
        name = f"{split}_{index:05d}.jpg"
        whole, encoded = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not whole:
            raise RuntimeError(f"OpenCV could not encode {name}")
        (images_dir / name).write_bytes(encoded.tobytes())
        height, width = scene.image.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for box, label, visible in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.visible.tolist()):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "visible": round(visible, 4),
                }
            )
    return {
        "info": {"description": f"handwritten digits, {split}, seed {seed}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": digit + 1, "name": name, "supercategory": "digit"} for digit, name in enumerate(CLASS_NAMES)
        ],
    }


def _files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return sorted(path for path in files if not any(map(is_hidden, path.relative_to(folder).parts)))


def is_made(output_dir: str | os.PathLike[str], train: int, val: int, seed: int, size: int) -> bool:
    """Return whether ``output_dir`` has, complete and unchanged, the files that :func:`make_sample` would write."""
    folder = Path(output_dir)
    try:
        record = read_record(folder / RECORD, SCHEMA)
    except UserError:
        return False
    wanted = {"recipe": _RECIPE, "train": train, "val": val, "seed": seed, "size": size}
    return record.get("parameters") == wanted and record.get("hash") == hash_files(_files(folder))


def make_sample(
    output_dir: str | os.PathLike[str],
    train: int = 300,
    val: int = 120,
    seed: int = 0,
    size: int = 256,
    progress: bool = True,
) -> bool:
    """Write the sample in COCO's form: ``images/{train,val}/*.jpg``, ``annotations/instances_{train,val}.json``.

    The folder is written completely or not at all. The same arguments give the same bytes with the same versions of
    scikit-learn, NumPy and OpenCV.

    Args:
        output_dir: the output folder; an existing sample with other parameters is replaced.
        train, val: number of scenes of each split.
        seed: at least 0.
        size: the longer side of the scenes in pixels.
        progress: show a progress bar (only if stderr is a terminal).

    Returns:
        True if the folder was written; False if it already had this sample.

    Raises:
        UserError: a parameter is out of range, or ``output_dir`` has files and was not made by this function.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("seed", seed, 0), ("size", size, MIN_SIZE)):
        if value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    target = Path(output_dir)
    if is_made(target, train, val, seed, size):
        return False
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        raise UserError(
            f"{target} holds files that are not a sample made before ({RECORD} is missing): "
            "choose another --output_dir or empty it"
        )
    with new_artifact(target) as staging:
        (staging / "annotations").mkdir()
        for split, count in (("train", train), ("val", val)):
            coco = _write_split(staging, split, count, seed, size, progress)
            text = json.dumps(coco, separators=(",", ":"), sort_keys=True)
            (staging / "annotations" / f"instances_{split}.json").write_text(text + "\n", encoding="utf-8")
        write_record(
            staging / RECORD,
            SCHEMA,
            {
                "parameters": {"recipe": _RECIPE, "train": train, "val": val, "seed": seed, "size": size},
                "hash": hash_files(_files(staging)),
            },
        )
    return True


def annotation_files(output_dir: str | os.PathLike[str], splits: Sequence[str] = SPLITS) -> list[Path]:
    """Return the paths of the annotation files that :func:`make_sample` writes for ``splits``."""
    return [Path(output_dir) / "annotations" / f"instances_{split}.json" for split in splits]
