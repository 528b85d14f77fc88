"""``detections.npz``: what the float and the INT8 model detect, kept beside the INT8 model."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from act_pipeline.errors import UserError
from act_pipeline.evaluation.result import Evaluation
from act_pipeline.records import write_bytes_atomically

DETECTIONS_FILENAME = "detections.npz"
# COCO's scores look no further.
KEPT_DETECTIONS = 100
# Some 90,000 images of 100 float32 rows, twice: a small file that unpacks to more is none of ours.
MAX_DETECTION_BYTES = 512 << 20


def save_detections(path: str | os.PathLike[str], evaluations: Mapping[str, Evaluation]) -> None:
    """Write the best 100 detections an image of several evaluations as NumPy's ``.npz``, which they can be scored from.

    Args:
        path: the file; by its users named ``detections.npz`` and kept beside the INT8 model.
        evaluations: name (``fp32``, ``int8``) -> evaluation; each becomes an array [M, 7] as ``Evaluation.detections``,
            float32, or float64 where an image id has more than float32's 24 bits.
    """
    arrays = {}
    for name, evaluation in evaluations.items():
        rows = best_detections(evaluation.detections)
        narrow = rows.astype(np.float32)
        exact = bool((narrow[:, [0, 6]] == rows[:, [0, 6]]).all())
        # By columns: equal ids stand beside each other then, and the file is a third smaller.
        arrays[name] = np.asfortranarray(narrow if exact else rows)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomically(path, buffer.getvalue())


def load_detections(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read what :func:`save_detections` wrote: name -> [M, 7] float64 as ``Evaluation.detections``.

    Raises:
        UserError: the file is missing, is damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_DETECTION_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, expected at most {MAX_DETECTION_BYTES}")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: np.ascontiguousarray(content[name], np.float64) for name in content.files}
    except FileNotFoundError:
        raise UserError(f"{path} is missing, expected the detections of an evaluation; compress again") from None
    except Exception as error:  # zipfile, its decompressors and NumPy's header reader raise whatever comes up
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} holds no detections ({reason}); delete it and compress again") from None
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != 7 or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {list(array.shape)}, expected finite rows of 7: image id, x, y, width, height, "
                "score, category id; delete it and compress again"
            )
    return arrays


def best_detections(detections: np.ndarray, count: int = KEPT_DETECTIONS) -> np.ndarray:
    """Return the ``count`` rows of each image with the highest scores, image by image, the surest first."""
    order = np.lexsort((-detections[:, 5], detections[:, 0]))
    ranked = detections[order]
    _, starts, sizes = np.unique(ranked[:, 0], return_index=True, return_counts=True)
    rank = np.arange(len(ranked)) - np.repeat(starts, sizes)
    return ranked[rank < count]
