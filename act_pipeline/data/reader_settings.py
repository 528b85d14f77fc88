"""Typed content of a reader YAML: data sets and preprocessing as ``ppdet`` interprets them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.config.schema import Source, build, describe, key
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.yaml_files import Tagged, apply_overrides, load_yaml, parse_override
from act_pipeline.data.classes import ModelClasses

SPLITS = {"train": "TrainDataset", "eval": "EvalDataset", "test": "TestDataset"}
DEFAULT_MAX_BAD_SHARE = 0.01
# Top-level keys of a reader file. PaddleDetection's files may have others; these are ignored unless they look like a
# misspelt key of this list. A complete model file (with `architecture`) has too many keys of its own for this check.
_KNOWN_KEYS = (
    "metric",
    "num_classes",
    "worker_num",
    "max_bad_share",
    "TrainDataset",
    "EvalDataset",
    "TestDataset",
    "TrainReader",
    "EvalReader",
    "TestReader",
    "EvalMOTDataset",
    "TestMOTDataset",
    "EvalMOTReader",
    "TestMOTReader",
)


@dataclass(frozen=True)
class CocoDataSet:
    """ppdet's ``COCODataSet``.

    Attributes:
        anno_path: the annotation file, relative to ``dataset_dir``.
        image_dir: the images' folder, relative to ``dataset_dir``.
        dataset_dir: the data set's folder; if None, ``anno_path`` and ``image_dir`` are paths of their own.
        sample_num: number of images, in the order of their ids; -1 for all.
        allow_empty: whether images without a box are used for training. Evaluation always uses every image.
        empty_ratio: the maximum share of such images; no limit outside [0, 1).
        load_crowd: whether crowd boxes count as boxes.
        repeat: number of passes over the images per training epoch.
        data_fields: the ground-truth fields that ppdet loads; not used here.
    """

    anno_path: str
    image_dir: str = ""
    dataset_dir: Optional[Path] = None
    sample_num: int = key(-1, at_least=-1)
    allow_empty: bool = False
    empty_ratio: float = 1.0
    load_crowd: bool = False
    repeat: int = key(1, at_least=1)
    data_fields: Optional[list[str]] = None


@dataclass(frozen=True)
class ImageFolder:
    """ppdet's ``ImageFolder``: images without ground truth.

    Attributes:
        image_dir: the folder, relative to ``dataset_dir``; searched recursively.
        dataset_dir: the data set's folder.
        anno_path: an annotation file with the class names, or a ``.txt`` with one name per line.
        sample_num: number of images, sorted by path; -1 for all.
        use_default_label: accepted for compatibility with ppdet; not used here.
    """

    image_dir: str = ""
    dataset_dir: Optional[Path] = None
    anno_path: Optional[str] = None
    sample_num: int = key(-1, at_least=-1)
    use_default_label: Optional[bool] = None


@dataclass(frozen=True)
class ReaderSection:
    """``EvalReader`` or ``TestReader``: a list of ``{transform: arguments}``, and the batch settings."""

    sample_transforms: list[dict[str, Any]]
    batch_transforms: list[dict[str, Any]] = key(factory=list)
    batch_size: int = key(1, at_least=1)
    shuffle: bool = False
    drop_last: bool = False
    collate_batch: bool = True
    use_shared_memory: bool = False
    inputs_def: Optional[dict[str, Any]] = None
    fuse_normalize: bool = False


@dataclass(frozen=True)
class Prompts:
    """The boxes of the data sets as prompts of a model that segments them.

    Attributes:
        encoder: makes the embeddings of the images, where the model that runs takes these instead of images; each box
            is a sample of its own then.
        partner_hash: hash of the other model of the pair, empty if there is none.
    """

    encoder: Optional[InferenceModel] = None
    partner_hash: str = ""


@dataclass(frozen=True)
class ReaderSettings:
    """Content of a reader file.

    Attributes:
        source: the file, for error messages.
        metric: ``COCO``.
        num_classes: number of classes; None if the file does not specify it, then the annotation file determines it.
        worker_num: number of threads that read and preprocess; 0, as in PaddleSlim's file, means the default.
        max_bad_share: the share of a split's images that may be missing or unreadable, in [0, 1].
        datasets: split (``train``, ``eval``, ``test``) -> data set, for the splits in the file.
        reader: ``EvalReader``, or ``TestReader`` if the file has no other.
        reader_name: which of the two.
        inputs_def: ``TestReader.inputs_def`` or ``EvalReader.inputs_def``.
        classes: classes of the model, with which categories are matched; None if unknown, then the order of the file is
            used.
        prompts: what boxes are prompts of; None: of nothing.
        unlabelled: splits whose labels are ignored, see :meth:`act_pipeline.data.reader.Reader.without_labels`.
        constants: input name -> array [1, ...] that every batch holds, repeated for each of its images.
        only: split -> the image files that it is restricted to, see :func:`act_pipeline.data.split.separate_splits`.
    """

    source: Source
    metric: str
    num_classes: Optional[int]
    worker_num: int
    max_bad_share: float
    datasets: dict[str, Union[CocoDataSet, ImageFolder]]
    reader: ReaderSection
    reader_name: str
    inputs_def: dict[str, Any]
    classes: Optional[ModelClasses] = None
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()
    prompts: Optional[Prompts] = None


@dataclass(frozen=True)
class _TopLevel:
    metric: str = "COCO"
    num_classes: Optional[int] = key(None, at_least=1)
    worker_num: int = key(0, at_least=0)
    max_bad_share: float = key(DEFAULT_MAX_BAD_SHARE, at_least=0, at_most=1)


def load_settings(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ReaderSettings:
    """Read and check a reader file, in PaddleSlim's form or PaddleDetection's.

    Args:
        path: the file.
        overrides: ``Section.key=value`` each, applied to the file's values.

    Raises:
        UserError: the file is not YAML, or has an invalid key, type or value.
    """
    path, overrides = find_shipped(path), list(overrides)
    content = apply_overrides(load_yaml(path), overrides)
    source = Source(path, tuple(".".join(parse_override(override)[0]) for override in overrides))
    for name in content:
        hint = suggest(name, _KNOWN_KEYS)
        if name not in _KNOWN_KEYS and hint and "architecture" not in content:
            raise UserError(f"{source.locate(str(name))} is not a known key{hint}")
    top = build(_TopLevel, {name: content[name] for name in content if name in _TopLevel.__dataclass_fields__}, source)
    if top.metric != "COCO":
        raise UserError(f"{source.locate('metric')} is the text '{top.metric}', expected COCO; convert the annotations")
    datasets = {
        split: _dataset(content[name], source, name) for split, name in SPLITS.items() if content.get(name) is not None
    }
    if not datasets:
        raise UserError(
            f"{source.path} has no data set, expected EvalDataset and TrainDataset with image_dir, anno_path and "
            "dataset_dir; is it a reader file?"
        )
    names = [name for name in ("EvalReader", "TestReader") if content.get(name) is not None]
    if not names:
        raise UserError(
            f"{source.locate('EvalReader')} is missing, expected sample_transforms and batch_size; "
            "configs/readers/rtdetr_reader.yml shows one"
        )
    readers = {name: build(ReaderSection, content[name], source, name) for name in names}
    reader = readers[names[0]]
    _check_steps(reader, names[0], source)
    inputs_def = next((readers[name].inputs_def for name in reversed(names) if readers[name].inputs_def), None)
    return ReaderSettings(
        source=source,
        metric=top.metric,
        num_classes=top.num_classes,
        worker_num=top.worker_num,
        max_bad_share=top.max_bad_share,
        datasets=datasets,
        reader=reader,
        reader_name=names[0],
        inputs_def=inputs_def or {},
    )


def _dataset(content: Any, source: Source, name: str) -> Union[CocoDataSet, ImageFolder]:
    if isinstance(content, Tagged):
        kind, fields = content.name, content.fields
    elif isinstance(content, dict):
        fields = dict(content)
        kind = fields.pop("name", None)
    else:
        raise UserError(
            f"{source.locate(name)} is {describe(content)}, expected one !COCODataSet node; "
            "to use several annotation files, join them into one"
        )
    known = {"COCODataSet": CocoDataSet, "ImageFolder": ImageFolder}
    if not isinstance(kind, str) or kind not in known:
        raise UserError(
            f"{source.locate(name)} is of the kind {kind!r}, expected COCODataSet (or ImageFolder for pictures alone); "
            "convert the annotations to COCO's form (PaddleDetection: tools/x2coco.py)"
        )
    return build(known[kind], fields, source, name)


def _check_steps(reader: ReaderSection, name: str, source: Source) -> None:
    """Check the form of the transforms; whether ppdet has them is checked when they are created."""
    for list_name in ("sample_transforms", "batch_transforms"):
        for index, step in enumerate(getattr(reader, list_name)):
            where = source.locate(f"{name}.{list_name}[{index}]")
            if len(step) != 1:
                raise UserError(f"{where} has {len(step)} names, expected one, as in '- Decode: {{}}'; split it")
            for transform, arguments in step.items():
                if arguments is not None and not isinstance(arguments, dict):
                    raise UserError(f"{where}: {transform} is {describe(arguments)}, expected a mapping of arguments")
    if not reader.sample_transforms:
        raise UserError(f"{source.locate(f'{name}.sample_transforms')} is empty, expected Decode, Resize, ..., Permute")
