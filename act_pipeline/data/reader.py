"""The `Reader`: data sets and preprocessing defined by a reader YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.yaml_files import resolve_path
from act_pipeline.data.annotations import Annotations
from act_pipeline.data.class_mapping import ClassMapping
from act_pipeline.data.classes import ModelClasses
from act_pipeline.data.dataset import Dataset, ImageRecord, coco_records, folder_records
from act_pipeline.data.embeddings import Embeddings
from act_pipeline.data.fingerprint import split_fingerprint
from act_pipeline.data.input_size import input_size, with_input_size
from act_pipeline.data.loader import Loader
from act_pipeline.data.prompts import with_prompts
from act_pipeline.data.reader_settings import CocoDataSet, Prompts, ReaderSettings, load_settings
from act_pipeline.data.split_files import SplitFiles, require_split
from act_pipeline.data.transforms import Preprocess, UnreadableImage

_CHECKED_IMAGES = 8


class Reader:
    """The data sets of a reader file, and the preprocessing shared by calibration, evaluation and prediction.

    All splits use the transforms of ``EvalReader``, including training: distillation compares two networks on the same
    input. PaddleSlim's example does the same.

    >>> reader = Reader.load("configs/readers/rtdetr_reader.yml")
    >>> for batch in reader.loader("eval", batch_size=8):
    ...     batch["image"].shape
    (8, 3, 640, 640)

    Attributes:
        path: the reader file.
        settings: its content.
        metric: ``COCO``.
        max_bad_share: the share of a split's images that may be missing or unreadable before a run is stopped.
    """

    def __init__(self, settings: ReaderSettings, annotations: Optional[dict[str, Annotations]] = None) -> None:
        """Use checked settings.

        Args:
            settings: the content of the reader file.
            annotations: parsed annotation files by path, to share with another reader; None for none.
        """
        self.settings = settings
        self.path = settings.source.path
        self.metric = settings.metric
        self.max_bad_share = settings.max_bad_share
        self._files = SplitFiles(settings)
        self._classes = ClassMapping(settings, self._files, annotations)
        self._datasets: dict[str, Dataset] = {}
        self._preprocess: Optional[Preprocess] = None

    @property
    def parsed_annotations(self) -> dict[str, Annotations]:
        """The cache of parsed annotation files, by path, which derived readers share."""
        return self._classes.parsed

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Reader:
        """Read a reader file, in PaddleSlim's form (``!COCODataSet``) or PaddleDetection's (``name: COCODataSet``).

        The data is read on first use or by :meth:`check`.

        Args:
            path: the file.
            overrides: ``Section.key=value`` each, applied to the file's values.

        Raises:
            UserError: the file is not YAML, or has an invalid key, type or value.
        """
        return cls(load_settings(path, overrides))

    def check(self, *splits: str) -> None:
        """Check annotation files, image files, and the transforms on a few images before a run starts.

        Args:
            splits: the splits to check.

        Raises:
            UserError: something is missing or invalid.
        """
        for split in splits:
            dataset = self.dataset(split)
            samples = [dataset[index] for index in range(0, len(dataset), -(-len(dataset) // _CHECKED_IMAGES))]
            for sample in samples:
                if sample is not None:
                    dataset.batch([sample])

    @property
    def num_classes(self) -> int:
        """The number of classes: of the model if known, otherwise of the reader file or the annotation file.

        Raises:
            UserError: there is no valid annotation file to count them in.
        """
        return self._classes.num_classes

    @property
    def class_names(self) -> list[str]:
        """The class names by class index: of the model if known, otherwise of the annotation file.

        Raises:
            UserError: there is no valid annotation file.
        """
        return self._classes.class_names

    @property
    def category_ids(self) -> list[int]:
        """The COCO category id of every class index, see :meth:`class_ids`."""
        return self.class_ids(self._classes.defining_annotations())

    def class_ids(self, annotations: Annotations) -> list[int]:
        """Return the category id of every class index in an annotation file.

        If the model is known (:meth:`with_classes`), categories are matched with its classes by name. Otherwise their
        order in the file is used, as in ppdet (``COCO.getCatIds()``).

        Raises:
            UserError: the categories do not fit the model's classes, or their number is not ``num_classes``.
        """
        return self._classes.class_ids(annotations)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels.

        Raises:
            UserError: neither the transforms nor ``inputs_def`` determine it.
        """
        try:
            return input_size(self.settings)
        except UserError:
            self.preprocessing()  # reports a misspelt transform, the more likely cause
            raise

    def annotation_file(self, split: str = "eval") -> Path:
        """Return the path of a split's annotation file.

        Raises:
            UserError: the reader file has no such split, or the split has no annotation file.
        """
        return self._files.annotation_file(split)

    def image_dir(self, split: str = "eval") -> Path:
        """Return the folder of a split's images.

        Raises:
            UserError: the reader file has no such split.
        """
        return self._files.image_dir(split)

    def annotations(self, split: str = "eval") -> Annotations:
        """Return a split's annotation file, read, checked and cached.

        The categories of ``train`` are not checked if the model's classes are known, since training uses no boxes.

        Images without labels (see :meth:`labelled`) have entries without boxes.

        Raises:
            UserError: the file is missing, is not JSON, lacks required COCO entries, or its categories are not the
                model's classes (see :meth:`class_ids`); in the ``eval`` split also if it has no boxes.
        """
        settings = self._files.dataset(split)
        if isinstance(settings, CocoDataSet):
            return self._classes.annotations(split, labelled=self.labelled(split))
        folder = self.image_dir(split)
        records = folder_records(settings, folder)
        images = [(record.image_id, os.path.relpath(record.file, folder)) for record in records]
        return Annotations.of_folder(folder, images, self._classes.folder_classes(split))

    def labelled(self, split: str = "eval") -> bool:
        """Return whether a split has labels that are used: it is no folder of images, and they are not ignored."""
        return isinstance(self._files.dataset(split), CocoDataSet) and split not in self.settings.unlabelled

    def require_labels(self, split: str, use: str) -> None:
        """Check that a split has labels.

        Args:
            split: ``train``, ``eval`` or ``test``.
            use: what they are needed for, for the message.

        Raises:
            UserError: it has none.
        """
        if not self.labelled(split):
            raise UserError(
                f"{self._files.locate(split)} has no labels, expected a !COCODataSet with anno_path for {use}"
            )

    def without_labels(self, split: str = "eval") -> Reader:
        """Return a copy of the reader that ignores the labels of a split."""
        unlabelled = self.settings.unlabelled | {split}
        return Reader(dataclasses.replace(self.settings, unlabelled=unlabelled), self.parsed_annotations)

    def dataset(self, split: str = "eval") -> Dataset:
        """Return the images of a split (``train``, ``eval`` or ``test``) whose files exist.

        ``eval`` and ``test`` have every image of the annotation file, including those without a box (regardless of
        ``allow_empty``). ``train`` has the images that ppdet would train on.

        Raises:
            UserError: the annotation file or the transforms are invalid, or too many images are missing.
        """
        if split not in self._datasets:
            records, where, repeat = self._images(split)
            where += self._files.searched(split, self.image_dir(split))
            only = self.settings.only.get(split)
            if only is not None:
                records = [record for record in records if str(record.file) in only]
            if not records:
                raise UserError(
                    f"{self._files.locate(split)} has no images ({where}), expected at least one; check image_dir and "
                    "dataset_dir, or set allow_empty: true to train on images without boxes"
                )
            self._datasets[split] = Dataset(records, self.preprocessing(), self.max_bad_share, where, repeat)
        return self._datasets[split]

    def _images(self, split: str) -> tuple[list[ImageRecord], str, int]:
        """Return the images of a split, the file or folder that lists them, and the passes over them per epoch."""
        settings, folder = self._files.dataset(split), self.image_dir(split)
        if isinstance(settings, CocoDataSet):
            training = split == "train"
            records = coco_records(settings, self.annotations(split), folder, training=training)
            if self.settings.prompts is not None:
                records = self._with_prompts(records, split)
            return records, str(self.annotation_file(split)), settings.repeat if training else 1
        if self.settings.prompts is not None:
            raise UserError(
                f"{self._files.locate(split)} has pictures alone, expected a !COCODataSet with boxes: the model "
                "segments what is in a box"
            )
        if not settings.image_dir:
            raise UserError(f"{self._files.locate(split)}.image_dir is missing, expected a folder; add it")
        return folder_records(settings, folder), str(folder), 1

    def _with_prompts(self, records: list[ImageRecord], split: str) -> list[ImageRecord]:
        """Return the images with their boxes, which are prompts also where the labels are not used."""
        annotations = self._classes.annotations(split)
        prompts = self.settings.prompts
        one_each = prompts is not None and prompts.encoder is not None
        return with_prompts(records, annotations, self.class_ids(annotations), one_each=one_each)

    def loader(
        self,
        split: str = "eval",
        *,
        batch_size: Optional[int] = None,
        shuffle: Optional[bool] = None,
        drop_last: Optional[bool] = None,
        workers: Optional[int] = None,
        seed: int = 0,
        images: Optional[int] = None,
        skip: int = 0,
    ) -> Loader:
        """Return an iterable over the batches of a split; see :class:`Loader` for the content of a batch.

        Args:
            split: ``train``, ``eval`` or ``test``.
            batch_size: images per batch; None for ``EvalReader.batch_size``.
            shuffle: None for True in ``train`` and False in the others.
            drop_last: drop a last, smaller batch; None for ``EvalReader.drop_last`` in ``train`` and False in the
                others, since a score needs every image.
            workers: number of prefetch threads; 0 reads in the calling thread; None for ``worker_num``, at least 1 and
                at most the number of CPUs.
            seed: of the order, which does not depend on the number of workers.
            images: number of images, drawn at random by ``seed`` without replacement; all if the split has fewer.
            skip: number of drawn images to skip before taking ``images``.

        Raises:
            UserError: see :meth:`dataset`; also if the only batch would be dropped.
        """
        dataset = self.dataset(split)
        if images is not None:
            dataset = dataset.choose(images, seed, skip)
        settings = self.settings.reader
        training = split == "train"
        batch_size = settings.batch_size if batch_size is None else batch_size
        drop_last = (training and settings.drop_last) if drop_last is None else drop_last
        if workers is None:
            workers = max(1, min(self.settings.worker_num, available_cpus()))
        if drop_last and len(dataset) < batch_size:
            raise UserError(
                f"{self._files.locate(split)} has {len(dataset)} images, expected at least one batch of {batch_size}: "
                f"lower batch_size or set {self.settings.reader_name}.drop_last: false"
            )
        return Loader(dataset, batch_size, training if shuffle is None else shuffle, drop_last, workers, seed)

    def preprocessing(self) -> Preprocess:
        """Return the transforms, which are created once.

        Raises:
            UserError: ppdet has no such transform, or rejects its arguments.
        """
        if self._preprocess is None:
            section, prompts = self.settings.reader, self.settings.prompts
            encoder = None if prompts is None else prompts.encoder
            self._preprocess = Preprocess(
                section.sample_transforms,
                section.batch_transforms,
                self.settings.num_classes or 80,
                self.settings.source,
                self.settings.reader_name,
                self.settings.constants,
                None if encoder is None else Embeddings(encoder),
            )
        return self._preprocess

    def preprocess(self, image_file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
        """Return one image file as a batch of 1 with ``im_id`` 0; see :class:`Loader` for the arrays.

        Raises:
            UserError: the file is missing or not an image.
        """
        try:
            sample = self.preprocessing().sample(Path(image_file), 0)
        except UnreadableImage as error:
            raise UserError(f"{image_file}: {error.reason}, expected a picture; check the file") from None
        return self.preprocessing().batch([sample])

    def with_input_size(self, height: int, width: int) -> Reader:
        """Return a copy of the reader that resizes to ``height`` x ``width`` pixels.

        Raises:
            UserError: its transforms determine no size.
        """
        return Reader(with_input_size(self.settings, height, width), self.parsed_annotations)

    def with_classes(self, classes: ModelClasses) -> Reader:
        """Return a copy of the reader that matches categories with a model's classes."""
        return Reader(dataclasses.replace(self.settings, classes=classes), self.parsed_annotations)

    def with_constants(self, constants: Mapping[str, np.ndarray]) -> Reader:
        """Return a copy of the reader whose batches also hold constant arrays.

        Args:
            constants: name -> array [1, ...], repeated for each image of a batch.
        """
        return Reader(dataclasses.replace(self.settings, constants=constants), self.parsed_annotations)

    def with_prompts(self, prompts: Prompts) -> Reader:
        """Return a copy of the reader whose batches also hold the boxes of the data sets as prompts."""
        return Reader(dataclasses.replace(self.settings, prompts=prompts), self.parsed_annotations)

    def with_transforms(self, sample_transforms: list[dict[str, Any]]) -> Reader:
        """Return a copy of the reader with other ``sample_transforms``."""
        section = dataclasses.replace(self.settings.reader, sample_transforms=sample_transforms)
        return Reader(dataclasses.replace(self.settings, reader=section), self.parsed_annotations)

    def with_dataset(
        self,
        split: str,
        image_dir: Optional[str] = None,
        anno_path: Optional[str] = None,
        dataset_dir: Optional[str] = None,
    ) -> Reader:
        """Return a copy of the reader whose ``split`` is another COCO data set; the file need not have this split.

        Args:
            split: ``train``, ``eval`` or ``test``.
            image_dir, anno_path, dataset_dir: new values, resolved as in the reader file; None leaves a value
                unchanged.

        Raises:
            UserError: there is no such split, or ``anno_path`` is missing.
        """
        require_split(split)
        before = self.settings.datasets.get(split)
        base = before if isinstance(before, CocoDataSet) else CocoDataSet(anno_path="")
        changes: dict[str, Any] = {}
        if image_dir is not None:
            changes["image_dir"] = str(image_dir)
        if anno_path is not None:
            changes["anno_path"] = str(anno_path)
        if dataset_dir is not None:
            changes["dataset_dir"] = resolve_path(str(dataset_dir), self.path)
        dataset = dataclasses.replace(base, **changes)
        if not dataset.anno_path:
            raise UserError(f"{self._files.locate(split)}.anno_path is missing, expected an annotation file; give one")
        datasets = {**self.settings.datasets, split: dataset}
        return Reader(dataclasses.replace(self.settings, datasets=datasets), self.parsed_annotations)

    def fingerprint(self, split: str = "eval") -> str:
        """Return ``sha256:<hex>`` of everything that determines the content of a split's batches, as a cache key.

        It covers the annotation file, the names and sizes of the images, and the settings that affect arrays or the
        choice of images. It does not cover the location of the data, the batch size, or the number of workers.
        """
        settings, reordered = self._files.dataset(split), None
        if isinstance(settings, CocoDataSet) and split != "train":
            annotations = self.annotations(split)
            ids = self.class_ids(annotations)
            reordered = ids if ids != annotations.category_ids else None
        return split_fingerprint(
            split,
            self.settings.reader,
            settings,
            num_classes=self._classes.known_count,
            records=self.dataset(split).records,
            image_dir=self.image_dir(split),
            annotation_file=self.annotation_file(split) if settings.anno_path is not None else None,
            reordered=reordered,
            ignores_labels=split in self.settings.unlabelled,
            constants=self.settings.constants,
            prompts=self.settings.prompts,
        )
