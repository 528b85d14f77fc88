"""Where the annotation files and images of a reader's splits lie."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from act_pipeline.core.errors import UserError
from act_pipeline.core.yaml_files import describe_search, resolve_path
from act_pipeline.data.reader_settings import SPLITS, CocoDataSet, ImageFolder, ReaderSettings


class SplitFiles:
    """The locations of the splits ``train``, ``eval`` and ``test``, as a reader file defines them."""

    def __init__(self, settings: ReaderSettings) -> None:
        self._settings = settings

    def dataset(self, split: str) -> Union[CocoDataSet, ImageFolder]:
        """Return a split's section of the reader file.

        Raises:
            UserError: the reader file has no such split.
        """
        require_split(split)
        if split not in self._settings.datasets:
            raise UserError(
                f"{self.locate(split)} is missing, expected a !COCODataSet with image_dir, anno_path and dataset_dir; "
                "add it"
            )
        return self._settings.datasets[split]

    def annotation_file(self, split: str) -> Path:
        """Return the path of a split's annotation file.

        Raises:
            UserError: the reader file has no such split, or the split has no annotation file.
        """
        dataset = self.dataset(split)
        if dataset.anno_path is None:
            raise UserError(f"{self.locate(split)}.anno_path is missing, expected an annotation file; add it")
        return self._resolve(dataset.dataset_dir, dataset.anno_path)

    def image_dir(self, split: str) -> Path:
        """Return the folder of a split's images.

        Raises:
            UserError: the reader file has no such split.
        """
        dataset = self.dataset(split)
        return self._resolve(dataset.dataset_dir, dataset.image_dir)

    def annotated_splits(self) -> list[str]:
        """Return the splits that have an annotation file, in order of preference for the class names.

        Raises:
            UserError: there is none.
        """
        found = self._annotated()
        if not found:
            path = self._settings.source.path
            raise UserError(f"{path} names no annotation file, expected EvalDataset.anno_path; add it")
        return found

    @property
    def is_annotated(self) -> bool:
        """Whether any split has an annotation file."""
        return bool(self._annotated())

    def _annotated(self) -> list[str]:
        named = self._settings.datasets
        order: tuple[str, ...] = ("eval", "train", "test")
        return [split for split in order if split in named and named[split].anno_path is not None]

    def locate(self, split: str) -> str:
        """Return the file and the section of a split, for messages."""
        return self._settings.source.locate(SPLITS[split])

    def searched(self, split: str, path: Path) -> str:
        """Return where a missing path of a split, or the ``dataset_dir`` that it is in, was looked for."""
        return describe_search(self.dataset(split).dataset_dir or path, self._settings.source.path)

    def _resolve(self, dataset_dir: Optional[Path], name: str) -> Path:
        if dataset_dir is None:
            return resolve_path(name, self._settings.source.path)
        return dataset_dir / Path(name).expanduser()


def require_split(split: str) -> None:
    """Raise a :class:`UserError` if there is no split of this name."""
    if split not in SPLITS:
        raise UserError(f"the data has no split '{split}', expected one of {', '.join(SPLITS)}")
