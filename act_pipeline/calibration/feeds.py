"""A reader's batches under the names of the model's inputs."""

from __future__ import annotations

import contextlib
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
from act_pipeline.graph.model_files import inspect_model

_Value = TypeVar("_Value")
# So many training images compare INT8 models, but at most one of five.
HELD_OUT_IMAGES = 32
_HELD_OUT_SHARE = 5


def open_reader(config: Config, model: InferenceModel, overrides: Sequence[str] = ()) -> tuple[Reader, tuple[str, ...]]:
    """Return the reader that a config names as a model takes it, and what was changed for that, in a line each.

    Where the compression evaluates, the images that judge are not those that calibrate and train.

    Raises:
        UserError: reader, data and model do not fit together.
    """
    fit = fit_reader(model, Reader.load(config.global_.reader_config, overrides))
    if not config.global_.evaluation:
        return fit.reader, fit.notes
    reader, note = separate_splits(fit.reader)
    return reader, fit.notes if note is None else (*fit.notes, note)


def model_feed(config: Config, feed_names: Sequence[str], batch: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return a reader's batch under the names of the model's inputs (``Global.input_list`` may rename)."""
    listed = config.global_.input_list
    renamed = {model: reader for reader, model in listed.items()} if isinstance(listed, dict) else {}
    sources = {name: renamed.get(name, name) for name in feed_names}
    for name, source in sources.items():
        if source not in batch:
            raise UserError(
                f"{config.path}: the reader has no input '{name}' for the model, it has {', '.join(sorted(batch))}; "
                "name it in Global.input_list"
            )
    return {name: batch[source] for name, source in sources.items()}


def feeds_of(
    config: Config, model: InferenceModel, batches: Callable[[], Iterator[Mapping[str, np.ndarray]]]
) -> Callable[[], Generator[dict[str, np.ndarray], None, None]]:
    """Return what gives a reader's batches under the names of the model's inputs."""
    names = list(inspect_model(model).inputs)
    return lambda: (model_feed(config, names, batch) for batch in batches())


def held_out(config: Config, reader: Reader, images: int | None = None) -> Loader:
    """Return the training images that INT8 models are compared on, one a batch, in an order that is always the same.

    No training sees them (:func:`training_reader`), and no calibration of the config, where there are images enough.

    Args:
        config: ``QuantPost`` decides which.
        reader: the data.
        images: so many; None: :data:`HELD_OUT_IMAGES`, but at most one of five.
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
    """Return the batches of :func:`held_out` under the names of the model's inputs."""
    names = list(inspect_model(model).inputs)
    with contextlib.closing(iter(held_out(config, reader, images))) as batches:
        return [model_feed(config, names, batch) for batch in batches]


def training_reader(config: Config, reader: Reader) -> Reader:
    """Return the reader that a training takes its batches from: without the images of :func:`held_out`.

    Where nothing is evaluated, or there is one image, none is held out.
    """
    files = [record.file for record in reader.dataset("train").records]
    if not config.global_.evaluation or len(files) < 2:
        return reader
    judging = {record.file for record in held_out(config, reader).dataset.records}
    return restricted(reader, train=[file for file in files if file not in judging])
