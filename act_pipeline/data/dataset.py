"""The images of one split, by id, and what becomes of those that cannot be read."""

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
    """An image: its COCO id (or its number in a folder) and its file."""

    image_id: int
    file: str


class Dataset:
    """The readable images of one split.

    ``dataset[i]`` is image ``i``, preprocessed, as :meth:`Preprocess.sample` gives it, or None if its file turns out to
    be unreadable. Such files, and those missing from the start, are warned about and skipped until their share passes
    ``max_bad_share``; then a :class:`UserError` ends the run.

    Attributes:
        records: the images that exist.
        total: how many images the split has, missing ones included.
        skipped: the files that are missing or unreadable, so far.
    """

    def __init__(
        self, records: Sequence[ImageRecord], preprocess: Preprocess, max_bad_share: float, where: str, repeat: int = 1
    ) -> None:
        """Look which files are there.

        Args:
            records: all images of the split.
            preprocess: the transforms.
            max_bad_share: the share of them that may be skipped.
            where: the annotation file or folder they come from, for messages.
            repeat: how often an epoch goes over the images.

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
        present = {record.file for record in self.records}
        self.skip([record.file for record in records if record.file not in present], "missing")

    def __len__(self) -> int:
        return len(self.records) * self._repeat

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        record = self.records[index % len(self.records)]
        try:
            return self._preprocess.sample(record.file, record.image_id)
        except UnreadableImage as error:
            self.skip([error.path], f"not readable ({error.reason})")
            return None

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack samples as :meth:`Preprocess.batch` does."""
        return self._preprocess.batch(samples)

    def choose(self, count: int, seed: int, skip: int = 0) -> Dataset:
        """Return a data set of ``count`` of the images (all, if there are fewer), chosen at random, each once.

        ``skip`` leaves out the first so many of the drawn ones: two choices of one seed, the second of which skips as
        many as the first took, have no image in common.
        """
        drawn = random.Random(seed).sample(range(len(self.records)), len(self.records))
        chosen = sorted(drawn[skip : skip + count])
        return Dataset([self.records[index] for index in chosen], self._preprocess, self._max_bad_share, self._where)

    def readable(self) -> int:
        """Return how many images an epoch gives, as far as is known: those there and not found unreadable."""
        return (self.total - len(self.skipped)) * self._repeat

    def skip(self, files: Sequence[str], reason: str) -> None:
        """Leave files out, with a warning that says why.

        Raises:
            UserError: too many cannot be used.
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
                f"most {self._max_bad_share:.1%}; check image_dir and dataset_dir, mend the files, or raise "
                "max_bad_share"
            )
        _logger.warning("%s: %s; skipped (%d of %d images so far)", named, reason, bad, self.total)


def coco_records(settings: CocoDataSet, annotations: Annotations, image_dir: Path, training: bool) -> list[ImageRecord]:
    """Return the images of an annotation file in the order of their ids.

    Evaluation takes every image: pycocotools counts what is detected on an image without boxes as false, and leaving
    such images out would raise the mAP. Training takes what ppdet's ``COCODataSet`` takes: images with a box, and with
    ``allow_empty`` those without, in the share ``empty_ratio``; all if the file has no ``annotations``.
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
    """Return the pictures of a folder and its subfolders, by name, numbered from 0.

    What is hidden is left out: ``._photo.jpg`` and ``__MACOSX`` of a Mac and ``.ipynb_checkpoints`` of a notebook are
    no pictures of the user's, whatever their names end in.
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
    """Return whether a file or folder of this name was put there by a notebook or a Mac, not by the user."""
    return name.startswith(".") or name == "__MACOSX"
