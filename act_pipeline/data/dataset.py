"""The images of one split, and the handling of images that cannot be read."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.data.annotations import Annotations, image_path
from act_pipeline.data.reader_settings import CocoDataSet, ImageFolder
from act_pipeline.data.transforms import Preprocess, UnreadableImage

_logger = logging.getLogger(__name__)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_NAMED_FILES = 3


@dataclass(frozen=True)
class ImageRecord:
    """One image.

    Attributes:
        image_id: its COCO id, or its index in a folder.
        file: its path.
        prompts: boxes to segment, one row each: class index, x1, y1, x2, y2 in pixels of the image.
    """

    image_id: int
    file: str
    prompts: tuple[tuple[float, ...], ...] = ()


class Dataset:
    """The readable images of one split.

    ``dataset[i]`` is the preprocessed image ``i``, see :meth:`Preprocess.sample`, or None if its file cannot be read.
    Missing and unreadable files are skipped with a warning, until their share exceeds ``max_bad_share``; then a
    :class:`UserError` ends the run.

    Attributes:
        records: the images whose files exist.
        total: number of images of the split, including missing ones.
        skipped: the files found missing or unreadable so far.
    """

    def __init__(
        self, records: Sequence[ImageRecord], preprocess: Preprocess, max_bad_share: float, where: str, repeat: int = 1
    ) -> None:
        """Check which files exist.

        Args:
            records: all images of the split.
            preprocess: the transforms.
            max_bad_share: the share of images that may be skipped, in [0, 1].
            where: the annotation file or folder of the images, for messages.
            repeat: number of passes over the images per epoch.

        Raises:
            UserError: more than that share is missing.
        """
        self.total = len(records)
        self.skipped: list[str] = []
        self._preprocess = preprocess
        self._max_bad_share = max_bad_share
        self._where = where
        self._repeat = repeat
        self._lock = threading.Lock()
        self.records = [record for record in records if os.path.isfile(record.file)]
        # The same for all batches, so that they can be joined.
        self._prompts = max((len(record.prompts) for record in records), default=0)
        present = {record.file for record in self.records}
        self.skip([record.file for record in records if record.file not in present], "missing")

    def __len__(self) -> int:
        return len(self.records) * self._repeat

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        record = self.records[index % len(self.records)]
        try:
            return self._preprocess.sample(record.file, record.image_id, record.prompts, self._prompts)
        except UnreadableImage as error:
            self.skip([error.path], f"not readable ({error.reason})")
            return None

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack samples, see :meth:`Preprocess.batch`."""
        return self._preprocess.batch(samples)

    def choose(self, count: int, seed: int, skip: int = 0) -> Dataset:
        """Return a data set of ``count`` images drawn at random without replacement, or of all if there are fewer.

        Args:
            count: number of images.
            seed: of the random order.
            skip: number of drawn images to skip. Two choices with the same seed, of which the second skips the
                ``count`` of the first, are disjoint.
        """
        drawn = random.Random(seed).sample(range(len(self.records)), len(self.records))
        chosen = sorted(drawn[skip : skip + count])
        return Dataset([self.records[index] for index in chosen], self._preprocess, self._max_bad_share, self._where)

    def readable(self) -> int:
        """Return the number of images per epoch, without those found missing or unreadable so far."""
        return (self.total - len(self.skipped)) * self._repeat

    def skip(self, files: Sequence[str], reason: str) -> None:
        """Exclude files, with a warning.

        Args:
            files: the files.
            reason: why they are excluded, for the warning.

        Raises:
            UserError: too many images cannot be used.
        """
        with self._lock:
            new = [file for file in files if file not in self.skipped]
            self.skipped.extend(new)
            bad = len(self.skipped)
        if not new:
            return
        named = ", ".join(new[:_NAMED_FILES]) + (", ..." if len(new) > _NAMED_FILES else "")
        if bad > self._max_bad_share * self.total or bad == self.total:
            raise UserError(
                f"{named}: {reason}; {bad} of the {self.total} images of {self._where} cannot be used, expected at "
                f"most {self._max_bad_share:.1%}; check image_dir and dataset_dir, repair the files, or raise "
                "max_bad_share"
            )
        _logger.warning("%s: %s; skipped (%d of %d images so far)", named, reason, bad, self.total)


def coco_records(settings: CocoDataSet, annotations: Annotations, image_dir: Path, training: bool) -> list[ImageRecord]:
    """Return the images of an annotation file in the order of their ids.

    Evaluation uses every image: pycocotools counts detections on images without boxes as false positives, so leaving
    such images out would raise the mAP. Training uses the same images as ppdet's ``COCODataSet``: those with a box and,
    with ``allow_empty``, those without in the share ``empty_ratio``; all if the file has no ``annotations``.

    Args:
        settings: the data set's settings.
        annotations: the annotation file.
        image_dir: the folder of the images.
        training: whether the images are for training.
    """
    images = annotations.images
    if training and annotations.boxes is not None:
        with_boxes = annotations.images_with_boxes(settings.load_crowd)
        empty = [image["id"] for image in images if image["id"] not in with_boxes]
        if not settings.allow_empty:
            empty = []
        elif 0 <= settings.empty_ratio < 1:
            wanted = int(len(with_boxes) * settings.empty_ratio / (1 - settings.empty_ratio))
            empty = random.Random(0).sample(empty, min(wanted, len(empty)))
        taken = with_boxes.union(empty)
        images = [image for image in images if image["id"] in taken]
    if settings.sample_num > 0:
        images = images[: settings.sample_num]
    return [ImageRecord(image["id"], str(image_path(image_dir, image["file_name"]))) for image in images]


def folder_records(settings: ImageFolder, folder: Path) -> list[ImageRecord]:
    """Return the images of a folder and its subfolders, sorted by path and numbered from 0.

    Hidden files and folders are ignored, such as ``._photo.jpg`` and ``__MACOSX`` from macOS, or
    ``.ipynb_checkpoints``: their files are not images of the user, whatever the extension.

    Args:
        settings: ``sample_num`` limits the number of images.
        folder: the folder.
    """
    files: list[str] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        pictures = [name for name in names if name.lower().endswith(_IMAGE_SUFFIXES) and not is_hidden(name)]
        files.extend(os.path.join(root, name) for name in pictures)
    files.sort()
    if settings.sample_num > 0:
        files = files[: settings.sample_num]
    return [ImageRecord(number, file) for number, file in enumerate(files)]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is one that macOS or a notebook creates, not the user."""
    return name.startswith(".") or name == "__MACOSX"
