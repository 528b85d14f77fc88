"""``detections.npz``: the detections of the float and the INT8 model, stored with the INT8 model."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.evaluation.coco import placed, places_of
from act_pipeline.evaluation.result import Evaluation

DETECTIONS_FILENAME = "detections.npz"
# The INT8 model's on calibration images, with class indices in the place of category ids.
CALIBRATION_FILENAME = "calibration.npz"
# COCO's metrics use at most this many detections per image and category.
KEPT_DETECTIONS = 100
# Limits against decompression bombs: scores and boxes hardly compress, so a real file never exceeds both.
MAX_DETECTION_BYTES, MAX_SHRINKAGE = 512 << 20, 50
_IDS, _NAMES = "image_ids", "image_names"
_MASKS = "_masks"


@dataclass(frozen=True)
class Detections:
    """Detections of several models on the same images.

    Attributes:
        image_ids: COCO ids of all evaluated images, in ascending order.
        image_names: uint32 [images], CRC-32 of the file names, to detect another data set with the same ids.
        rows: model (``fp32``, ``int8``) -> float64 [M, 7], see ``Evaluation.detections``.
        masks: model -> mask of each row, COCO's run lengths; without models that give none.
    """

    image_ids: list[int]
    image_names: np.ndarray
    rows: dict[str, np.ndarray]
    masks: dict[str, list[Any]] = field(default_factory=dict)

    def known(self, file_names: Mapping[int, str]) -> list[int]:
        """Return those of ``image_ids`` that occur in another data set with the same file name, in ascending order.

        Args:
            file_names: COCO id -> file name of the other data set.
        """
        return [
            number
            for number, key in zip(self.image_ids, self.image_names.tolist())
            if number in file_names and _name_key(file_names[number]) == key
        ]


def save_detections(
    path: str | os.PathLike[str], evaluations: Mapping[str, Evaluation], file_names: Mapping[int, str]
) -> None:
    """Write the detections of evaluations as NumPy ``.npz``, from which exactly the same scores can be computed.

    The file has ``image_ids`` int64, ``image_names`` (see :class:`Detections`), and for each evaluation [M, 7]: index
    in ``image_ids``, x1, y1, x2, y2, score, category id as float32. If float32 would change a number, the rows are
    stored unchanged as float64. The masks of an evaluation are JSON in ``<name>_masks``, uint8.

    Args:
        path: the file.
        evaluations: name (``fp32``, ``int8``) -> evaluation.
        file_names: COCO id -> file name.
    """
    ids = sorted({number for evaluation in evaluations.values() for number in evaluation.image_ids})
    arrays: dict[str, np.ndarray] = {
        _IDS: np.array(ids, np.int64),
        _NAMES: np.array([_name_key(file_names[number]) for number in ids], np.uint32),
    }
    place_of = places_of(ids)
    for name, evaluation in evaluations.items():
        rows = placed(evaluation.detections, evaluation.image_ids, place_of)
        if evaluation.masks is None:
            rows = best_detections(rows)
        else:  # one row a prompt: as many as there are objects, in the order of the masks
            text = json.dumps(evaluation.masks)
            arrays[f"{name}{_MASKS}"] = np.frombuffer(text.encode(), np.uint8)
        arrays[name] = _stored(rows)
    _write(path, arrays)


def save_calibration_detections(path: str | os.PathLike[str], rows: np.ndarray, images: int) -> None:
    """Write the INT8 model's detections on calibration images, for :func:`load_detections`.

    Args:
        path: the file.
        rows: [M, 7] as ``Evaluation.detections``, with the positions of the images and class indices.
        images: number of images.
    """
    ids: dict[str, np.ndarray] = {
        _IDS: np.arange(images, dtype=np.int64),
        _NAMES: np.zeros(images, np.uint32),
    }
    _write(path, {**ids, "int8": _stored(best_detections(rows))})


def _stored(rows: np.ndarray) -> np.ndarray:
    """Return rows as they are stored: in float32 if that changes no number."""
    narrow = _narrow(rows)
    exact = bool((_wide(narrow) == rows).all())
    # Column-major order puts similar numbers next to each other: the compressed file is a third smaller.
    return np.asfortranarray(narrow if exact else rows)


def _write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomically(path, buffer.getvalue())


def load_detections(path: str | os.PathLike[str]) -> Detections:
    """Read a file written by :func:`save_detections`.

    Raises:
        UserError: the file is missing, damaged, or has other content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_DETECTION_BYTES and size > MAX_SHRINKAGE * os.path.getsize(path):
            raise ValueError(f"it unpacks to {size} bytes, expected at most {MAX_SHRINKAGE} times its own")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
            texts = [name for name in arrays if name.endswith(_MASKS)]
            masks = {name[: -len(_MASKS)]: json.loads(arrays.pop(name).tobytes()) for name in texts}
            rows = {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing, expected the detections of an evaluation; compress again") from None
    except Exception as error:  # zipfile, its decompressors and NumPy's header reader raise whatever comes up
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} holds no detections ({reason}); delete it and compress again") from None
    ids, names = arrays.pop(_IDS, None), arrays.pop(_NAMES, None)
    if ids is None or names is None:
        raise UserError(f"{path} lacks {_IDS} or {_NAMES}, an earlier version wrote it; delete it and compress again")
    if (
        ids.dtype != np.int64 or names.dtype != np.uint32 or ids.ndim != 1 or ids.shape != names.shape
        or (ids[1:] <= ids[:-1]).any()
    ):  # fmt: skip
        raise UserError(f"{path}: {_IDS} or {_NAMES} is damaged; delete it and compress again")
    found = {}
    for name, array in arrays.items():
        whole = rows[name]
        if whole.ndim != 2 or whole.shape[1] != 7 or not np.isfinite(whole).all() or not _is_placed(whole, len(ids)):
            raise UserError(
                f"{path}: {name} is {list(array.shape)}, expected finite rows of 7: place of the image, box, score, "
                "category id; delete it and compress again"
            )
        found[name] = _wide(array) if array.dtype == np.float32 else whole
    for name, entries in masks.items():
        if name not in found or not _are_masks(entries) or len(entries) != len(found[name]):
            raise UserError(f"{path}: {name}{_MASKS} is damaged; delete it and compress again")
    return Detections(ids.tolist(), names, found, masks)


def _are_masks(entries: Any) -> bool:
    """Return whether content of a file is a list of masks that pycocotools can read."""
    if not isinstance(entries, list):
        return False
    for entry in entries:
        size = entry.get("size") if isinstance(entry, dict) else None
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(edge, int) for edge in size):
            return False
        counts = entry.get("counts")
        if not isinstance(counts, str) or not _covers(counts, size):
            return False
    return True


def _covers(counts: str, size: Sequence[int]) -> bool:
    """Return whether COCO's compressed run lengths cover a mask exactly, which pycocotools does not check."""
    runs: list[int] = []
    value, shift = 0, 0
    for letter in counts:
        digit = ord(letter) - 48
        if not 0 <= digit < 64 or shift > 30:
            return False
        value |= (digit & 0x1F) << shift
        shift += 5
        if not digit & 0x20:
            if digit & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return not shift and all(run >= 0 for run in runs) and sum(runs) == size[0] * size[1]


def best_detections(detections: np.ndarray, count: int = KEPT_DETECTIONS) -> np.ndarray:
    """Return the detections with the highest scores of each image and category.

    Args:
        detections: [M, 7], see ``Evaluation.detections``.
        count: the maximum per image and category.

    Returns:
        [K, 7], sorted by image, then by descending score. Detections of one category with equal scores keep their
        order, on which COCO's evaluation depends.
    """
    ranked = detections[np.lexsort((-detections[:, 5], detections[:, 6], detections[:, 0]))]
    new = np.ones(len(ranked), bool)
    new[1:] = (ranked[1:, [0, 6]] != ranked[:-1, [0, 6]]).any(axis=1)
    starts = np.flatnonzero(new)
    rank = np.arange(len(ranked)) - np.repeat(starts, np.diff([*starts, len(ranked)]))
    kept = ranked[rank < count]
    return kept[np.lexsort((-kept[:, 5], kept[:, 0]))]


def _narrow(rows: np.ndarray) -> np.ndarray:
    """Return float32 [M, 7] with corners: engines output corners, and the difference x2 - x1 has more digits."""
    corners = rows[:, 1:3] + rows[:, 3:5]
    with np.errstate(over="ignore"):
        return np.column_stack([rows[:, :3], corners, rows[:, 5:]]).astype(np.float32)


def _wide(narrow: np.ndarray) -> np.ndarray:
    rows = narrow.astype(np.float64)
    with np.errstate(invalid="ignore"):  # values beyond float32's range became infinite
        rows[:, 3:5] -= rows[:, 1:3]
    return np.ascontiguousarray(rows)


def _is_placed(rows: np.ndarray, images: int) -> bool:
    places = rows[:, 0]
    return bool(((places >= 0) & (places < images) & (places % 1 == 0) & (rows[:, 6] % 1 == 0)).all())


def _name_key(file_name: str) -> int:
    return zlib.crc32(str(file_name).encode("utf-8", "surrogatepass"))
