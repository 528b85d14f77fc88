"""The reader YAML, typed: the data sets and the preprocessing that ``ppdet`` would make of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from act_pipeline.config.schema import Source, build, describe, key
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.yaml_files import Tagged, apply_overrides, load_yaml, parse_override
from act_pipeline.data.classes import ModelClasses

SPLITS = {"train": "TrainDataset", "eval": "EvalDataset", "test": "TestDataset"}
DEFAULT_MAX_BAD_SHARE = 0.01
# Top-level keys of a reader file. PaddleDetection's files may hold more; those are left alone unless they look like one
# of these misspelt. A whole model file (it has `architecture`) has too many keys of its own for such a guess.
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
        dataset_dir: the data set's folder; None: ``anno_path`` and ``image_dir`` stand alone.
        sample_num: how many images are taken, in the order of their ids; -1: all.
        allow_empty: whether images without a box are trained on. Evaluation takes every image always.
        empty_ratio: the share that they may have among all; outside [0, 1): no limit.
        load_crowd: whether crowd boxes count as boxes.
        repeat: how often an epoch of training goes over the images.
        data_fields: what ppdet loads of the ground truth. Compressing and evaluating need none of it.
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
    """ppdet's ``ImageFolder``: pictures without ground truth.

    Attributes:
        image_dir: the folder, relative to ``dataset_dir``; searched with its subfolders.
        dataset_dir: the data set's folder.
        anno_path: the annotation file that has the class names, or a ``.txt`` of them, one a line.
        sample_num: how many images are taken, by name; -1: all.
    """

    image_dir: str = ""
    dataset_dir: Optional[Path] = None
    anno_path: Optional[str] = None
    sample_num: int = key(-1, at_least=-1)
    use_default_label: Optional[bool] = None


@dataclass(frozen=True)
class ReaderSection:
    """``EvalReader`` or ``TestReader``: transforms as ``{name: arguments}``, one each, and how batches are made."""

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
class ReaderSettings:
    """What a reader file says.

    Attributes:
        source: the file, for error messages.
        metric: ``COCO``.
        num_classes: None if the file does not say: the annotation file decides.
        worker_num: threads that read and preprocess; 0 as in PaddleSlim's file means the default.
        max_bad_share: the share of a split's images that may be missing or not decodable.
        datasets: by split (``train``, ``eval``, ``test``), those that the file has.
        reader: ``EvalReader``; ``TestReader`` in a file that has no other.
        reader_name: which of the two.
        inputs_def: ``TestReader.inputs_def`` or ``EvalReader.inputs_def``.
        classes: of the model that the reader feeds, which the annotations' categories are matched to; None: it is not
            known, and the file's order counts.
        only: split -> the files of the images that it is restricted to, see
            :func:`act_pipeline.data.split.separate_splits`.
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
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _TopLevel:
    metric: str = "COCO"
    num_classes: Optional[int] = key(None, at_least=1)
    worker_num: int = key(0, at_least=0)
    max_bad_share: float = key(DEFAULT_MAX_BAD_SHARE, at_least=0, at_most=1)


def load_settings(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ReaderSettings:
    """Read and check a reader file, in PaddleSlim's form or PaddleDetection's.

    Raises:
        UserError: the file is no YAML, or a key, type or value is not what a reader has.
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
    """Check the form of the transforms; whether ppdet has them is checked where they are made."""
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
