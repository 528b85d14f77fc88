"""Separation of the images used for evaluation from those used for calibration and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Optional

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.data.reader import Reader

# The minimum number of images of TrainDataset that are not in EvalDataset, to calibrate on these alone.
_FEWEST_TRAIN_IMAGES = 100


def separate_splits(reader: Reader, seed: int = 0) -> tuple[Reader, Optional[str]]:
    """Return a reader whose splits ``train`` and ``eval`` have no image in common.

    If ``TrainDataset`` has enough images of its own, those of ``EvalDataset`` are removed from it. Otherwise, or if it
    is missing, the common images are split at random: one half for calibration (and training), the other for
    evaluation.

    Args:
        reader: the reader; it is not changed.
        seed: of the random split.

    Returns:
        the reader, and a one-line note of the change; None if nothing was changed.

    Raises:
        UserError: the data cannot be read, or there is only a single image.
    """
    if "train" not in reader.settings.datasets and "eval" not in reader.settings.datasets:
        return reader, None
    judging = _files(reader, "eval")
    if "train" not in reader.settings.datasets:
        datasets = {**reader.settings.datasets, "train": reader.settings.datasets["eval"]}
        ignored = reader.settings.unlabelled
        settings = dataclasses.replace(
            reader.settings, datasets=datasets, unlabelled=ignored | {"train"} if "eval" in ignored else ignored
        )
        reader = Reader(settings, reader.parsed_annotations)
        reason = "there is no TrainDataset"
    else:
        reason = ""
    training = _files(reader, "train")
    shared = set(training) & set(judging)
    if not shared:
        return reader, None
    own = [name for name in training if name not in shared]
    if not reason and len(own) >= _FEWEST_TRAIN_IMAGES:
        note = f"{len(shared)} images of EvalDataset are in TrainDataset too: evaluated, and left out of calibration"
        return restricted(reader, own, judging), f"{reader.path}: {note}"
    if len(judging) < 2:
        raise UserError(
            f"{reader.path}: EvalDataset has one image, which TrainDataset has too, expected another one to "
            "calibrate on; add images"
        )
    dealt = [name for name in judging if name in shared]
    chosen = np.random.default_rng(seed).permutation(len(dealt))[: max(len(dealt) // 2, 1)]
    calibrating = {dealt[index] for index in chosen}
    evaluated = [name for name in judging if name not in calibrating]
    train = [name for name in training if name not in set(evaluated)]
    reason = reason or "TrainDataset and EvalDataset share their images"
    note = f"{reason}: {len(train)} images, drawn by chance, calibrate, and the other {len(evaluated)} are evaluated"
    return restricted(reader, train, evaluated), f"{reader.path}: {note}"


def _files(reader: Reader, split: str) -> list[str]:
    # Once each: a data set of prompts has an image more than once.
    return list(dict.fromkeys(str(record.file) for record in reader.dataset(split).records))


def restricted(reader: Reader, train: Sequence[str], evaluated: Optional[Sequence[str]] = None) -> Reader:
    """Return a copy of the reader with splits restricted to some of their images.

    Args:
        reader: the reader; it is not changed.
        train, evaluated: image files of the splits ``train`` and ``eval``; None leaves ``eval`` unrestricted.
    """
    only = {"train": frozenset(train)}
    if evaluated is not None:
        only["eval"] = frozenset(evaluated)
    settings = dataclasses.replace(reader.settings, only={**(reader.settings.only or {}), **only})
    return Reader(settings, reader.parsed_annotations)
