"""Map a reader's batches to the names of the model's inputs, and hold training images out for comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.loader import Loader
from act_pipeline.data.model_fit import fit_reader
from act_pipeline.data.split import restricted, separate_splits
from act_pipeline.families.interface import PROMPTS
from act_pipeline.graph.model_files import inspect_model

_Value = TypeVar("_Value")
# Number of training images that INT8 models are compared on. At most a fifth of the data is taken from training.
HELD_OUT_IMAGES = 32
_HELD_OUT_SHARE = 5


def open_reader(config: Config, model: InferenceModel, overrides: Sequence[str] = ()) -> tuple[Reader, tuple[str, ...]]:
    """Return the config's reader, fitted to a model.

    With ``Global.Evaluation`` the images of EvalDataset are kept separate from those that calibrate and train.

    Args:
        config: the compression config; ``Global.reader_config`` is the reader's file.
        model: the float model, whose inputs the reader has to match.
        overrides: ``Section.key=value`` each, set over the values of the reader's file.

    Returns:
        The reader, and one line for each change that was made to it.

    Raises:
        UserError: reader, data and model do not fit together, or the data cannot be split.
    """
    fit = fit_reader(model, Reader.load(config.global_.reader_config, overrides))
    if not config.global_.evaluation:
        return fit.reader, fit.notes
    reader, notes = evaluated_splits(fit.reader, config.global_.evaluation)
    return reader, (*fit.notes, *notes)


def evaluated_splits(reader: Reader, evaluation: object) -> tuple[Reader, tuple[str, ...]]:
    """Return a reader whose EvalDataset is what a compression evaluates, without images that calibrate.

    Args:
        reader: fitted to the model.
        evaluation: ``Global.Evaluation``.

    Returns:
        The reader, and one line for each change that was made to it.

    Raises:
        UserError: the data cannot be split.
    """
    reader, notes = _evaluated(evaluation, reader)
    reader, note = separate_splits(reader)
    return reader, (*notes, *([] if note is None else [note]))


def _evaluated(evaluation: object, reader: Reader) -> tuple[Reader, list[str]]:
    """Return a reader whose EvalDataset is what models are evaluated on, with or without labels, and notes on it."""
    datasets = reader.settings.datasets
    if evaluation == "agreement":
        notes = []
        if "eval" not in datasets and "test" in datasets:
            datasets = {**datasets, "eval": datasets["test"]}
            reader = Reader(dataclasses.replace(reader.settings, datasets=datasets), reader.parsed_annotations)
            notes = [f"{reader.path}: there is no EvalDataset: the models are compared on the images of TestDataset"]
        return (reader.without_labels() if "eval" in datasets else reader), notes
    if "eval" not in datasets or reader.labelled("eval"):
        return reader, []
    note = (
        "EvalDataset has no labels: INT8 models are compared with the float model by their agreement "
        "(Strategy.min_agreement), without mAP"
    )
    return reader, [f"{reader.path}: {note}"]


def model_feed(config: Config, feed_names: Sequence[str], batch: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return a reader's batch under the names of the model's inputs.

    Args:
        config: ``Global.input_list`` may rename inputs.
        feed_names: the model's inputs.
        batch: reader's name -> array.

    Returns:
        Model's name -> array, in the order of ``feed_names``.

    Raises:
        UserError: the batch has no array for an input of the model.
    """
    listed = config.global_.input_list
    renamed = {model: reader for reader, model in listed.items()} if isinstance(listed, dict) else {}
    sources = {name: renamed.get(name, name) for name in feed_names}
    for name, source in sources.items():
        if source not in batch:
            raise UserError(
                f"{config.path}: the reader has no input '{name}' for the model, it has {', '.join(sorted(batch))}; "
                "if it is one of these, say so in Global.input_list; otherwise export the model without it"
            )
    return {name: batch[source] for name, source in sources.items()}


def feeds_of(
    config: Config, model: InferenceModel, batches: Callable[[], Iterator[Mapping[str, np.ndarray]]]
) -> Callable[[], Generator[dict[str, np.ndarray], None, None]]:
    """Return a function that yields a reader's batches under the names of the model's inputs.

    Args:
        config: ``Global.input_list`` may rename inputs.
        model: the model whose inputs are fed.
        batches: yields the reader's batches, from the start at every call.
    """
    names = list(inspect_model(model).inputs)
    return lambda: (model_feed(config, names, batch) for batch in batches())


def held_out(config: Config, reader: Reader, images: int | None = None) -> Loader:
    """Return the training images that INT8 models are compared on, in a fixed order, with batch size 1.

    They are excluded from training (:func:`training_reader`). They are excluded from calibration too, unless the data
    set has too few images for both.

    Args:
        config: ``QuantPost.images`` is the number of calibration images to skip, ``QuantPost.seed`` the seed of the
            random choice.
        reader: the data.
        images: how many; None: :data:`HELD_OUT_IMAGES`, but at most a fifth of the readable training images.
    """
    settings = config.quant_post
    count = images
    if count is None:
        count = max(min(HELD_OUT_IMAGES, reader.dataset("train").readable() // _HELD_OUT_SHARE), 1)
    load = functools.partial(
        reader.loader, "train", batch_size=1, shuffle=False, drop_last=False, seed=settings.seed, images=count
    )
    loader = load(skip=settings.images)
    return loader if len(loader) == count else load()


def held_out_feeds(
    config: Config, reader: Reader, model: InferenceModel, images: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Return the batches of :func:`held_out` under the names of the model's inputs.

    Args:
        config, reader, images: as for :func:`held_out`.
        model: the model whose inputs are fed.

    Returns:
        One feed an image: input name -> array whose first axis has length 1. Where the model segments what is in a box,
        a feed also has the other arrays of the batch, which its masks are decoded with.
    """
    names = list(inspect_model(model).inputs)
    with contextlib.closing(iter(held_out(config, reader, images))) as batches:
        return [{**_decoded_with(batch), **model_feed(config, names, batch)} for batch in batches]


def _decoded_with(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return batch if PROMPTS in batch else {}


def model_inputs(feed: Mapping[str, np.ndarray], model: InferenceModel) -> dict[str, np.ndarray]:
    """Return the arrays of a feed of :func:`held_out_feeds` that are inputs of the model."""
    return {name: feed[name] for name in inspect_model(model).inputs}


def training_reader(config: Config, reader: Reader) -> Reader:
    """Return the reader for training, without the images of :func:`held_out`.

    The reader is returned unchanged if ``Global.Evaluation`` is false or there is only one training image.
    """
    files = [record.file for record in reader.dataset("train").records]
    if not config.global_.evaluation or len(files) < 2:
        return reader
    judging = {record.file for record in held_out(config, reader).dataset.records}
    return restricted(reader, train=[file for file in files if file not in judging])
