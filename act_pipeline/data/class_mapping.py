"""The classes of a reader: its annotation files, and their categories matched with the model's classes."""

from __future__ import annotations

import logging
from typing import Optional

from act_pipeline.core.errors import UserError
from act_pipeline.data.annotations import Annotations
from act_pipeline.data.classes import check_count, match_classes, read_label_list
from act_pipeline.data.reader_settings import ReaderSettings
from act_pipeline.data.split_files import SplitFiles

_logger = logging.getLogger(__name__)


class ClassMapping:
    """Annotation files, read once, and the category id of every class index in each.

    Attributes:
        parsed: cache of parsed annotation files, by path.
    """

    def __init__(
        self, settings: ReaderSettings, files: SplitFiles, parsed: Optional[dict[str, Annotations]] = None
    ) -> None:
        self._settings, self._files = settings, files
        # Derived readers share the parsed annotation files, since parsing COCO's takes seconds each.
        self.parsed = {} if parsed is None else parsed
        self._class_ids: dict[str, list[int]] = {}

    @property
    def num_classes(self) -> int:
        """See :attr:`act_pipeline.data.reader.Reader.num_classes`."""
        if self._settings.classes is not None:
            return self._settings.classes.count
        if self._settings.num_classes is not None:
            return self._settings.num_classes
        split = self._files.annotated_splits()[0]
        if self._files.annotation_file(split).suffix == ".txt":
            return len(self.class_names)
        return len(self.defining_annotations().category_ids)

    @property
    def known_count(self) -> Optional[int]:
        """The number of classes; None if neither the model, nor the reader file, nor an annotation file defines it."""
        settings = self._settings
        if settings.classes is None and settings.num_classes is None and not self._files.is_annotated:
            return None
        return self.num_classes

    def folder_classes(self, split: str) -> list[str]:
        """Return the class names by class index for images without an annotation file.

        Args:
            split: whose images they are, for the message.

        Raises:
            UserError: nothing defines the classes.
        """
        count = self.known_count
        if count is None:
            raise UserError(
                f"{self._files.locate(split)} has no labels, and neither the model nor {self._settings.source.path} "
                "says how many classes there are; expected num_classes in that file"
            )
        if self._files.is_annotated or (self._settings.classes is not None and self._settings.classes.names):
            return self.class_names
        return [f"class_{index}" for index in range(count)]

    @property
    def class_names(self) -> list[str]:
        """See :attr:`act_pipeline.data.reader.Reader.class_names`."""
        classes = self._settings.classes
        if classes is not None and classes.names is not None:
            return list(classes.names)
        split = self._files.annotated_splits()[0]
        path = self._files.annotation_file(split)
        if path.suffix == ".txt":
            return read_label_list(path, self._named_by(split))
        annotations = self.annotations(split)
        by_id = dict(zip(annotations.category_ids, annotations.class_names))
        return [by_id[category_id] for category_id in self.class_ids(annotations)]

    def defining_annotations(self) -> Annotations:
        """Return the annotation file that defines the categories: that of ``eval``, otherwise the first one."""
        return self.annotations(self._files.annotated_splits()[0])

    def annotations(self, split: str, *, labelled: bool = True) -> Annotations:
        """See :meth:`act_pipeline.data.reader.Reader.annotations`; without boxes if not ``labelled``."""
        path = self._files.annotation_file(split)
        if str(path) not in self.parsed:
            self.parsed[str(path)] = Annotations.load(path, self._named_by(split))
        annotations = self.parsed[str(path)]
        if split != "train" or self._settings.classes is None:  # no box of the training images is used
            self.class_ids(annotations)
        if not labelled:
            return annotations.without_boxes()
        if split == "eval" and not annotations.boxes:
            raise UserError(
                f"{path} has no boxes in 'annotations', expected ground truth to evaluate on; name another, or "
                "compress without labels, Global.Evaluation: agreement"
            )
        return annotations

    def _named_by(self, split: str) -> str:
        searched = self._files.searched(split, self._files.annotation_file(split))
        return f"{self._files.locate(split)}.anno_path{searched}"

    def class_ids(self, annotations: Annotations) -> list[int]:
        """See :meth:`act_pipeline.data.reader.Reader.class_ids`."""
        path = str(annotations.path)
        if path not in self._class_ids:
            self._class_ids[path] = self._match(annotations)
        return list(self._class_ids[path])

    def _match(self, annotations: Annotations) -> list[int]:
        if self._settings.classes is None:
            check_count(self._settings.num_classes, self._settings.source.locate("num_classes"), annotations)
            return annotations.category_ids
        ids, notes = match_classes(self._settings.classes, annotations)
        for note in notes:
            _logger.warning("%s", note)
        return ids
