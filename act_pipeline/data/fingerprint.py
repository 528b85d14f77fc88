"""Hash of everything that determines the content of a split's batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.core.hashing import hash_files
from act_pipeline.data.dataset import ImageRecord
from act_pipeline.data.reader_settings import CocoDataSet, ImageFolder, Prompts, ReaderSection


def split_fingerprint(
    split: str,
    section: ReaderSection,
    dataset: Union[CocoDataSet, ImageFolder],
    *,
    num_classes: Optional[int],
    records: Sequence[ImageRecord],
    image_dir: Path,
    annotation_file: Optional[Path],
    reordered: Optional[Sequence[int]],
    ignores_labels: bool = False,
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
    prompts: Optional[Prompts] = None,
) -> str:
    """Return ``sha256:<hex>``, see :meth:`act_pipeline.data.reader.Reader.fingerprint`.

    Args:
        split: ``train``, ``eval`` or ``test``.
        section: the reader's transforms.
        dataset: the split's section of the reader file.
        num_classes: number of classes; None: unknown.
        records: the images.
        image_dir: the folder of the images.
        annotation_file: None if the split has none.
        reordered: the category id of every class index, if their order is not that of the annotation file.
        ignores_labels: whether the boxes of the annotation file are ignored.
        constants: what every batch holds besides the images.
        prompts: what the boxes are prompts of.
    """
    chosen = dataclasses.asdict(dataset)
    for place in ("dataset_dir", "image_dir", "anno_path"):
        chosen.pop(place)
    files = [
        (record.image_id, os.path.relpath(record.file, image_dir), os.path.getsize(record.file)) for record in records
    ]
    annotations = hash_files([annotation_file]) if annotation_file is not None else None
    body: list[Any] = [
        split, num_classes, chosen, section.sample_transforms, section.batch_transforms, files, annotations
    ]  # fmt: skip
    if reordered is not None:
        body.append(list(reordered))
    if ignores_labels:
        body.append("without labels")
    if constants:
        body.append({name: [array.dtype.name, array.shape, _hash(array)] for name, array in constants.items()})
    if prompts is not None:
        body.append({"prompts": prompts.partner_hash, "each": prompts.encoder is not None})
    return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
