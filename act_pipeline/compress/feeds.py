"""A reader's batches under the names of the model's inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from act_pipeline.config import Config
from act_pipeline.data import Reader
from act_pipeline.data.split import separate_splits
from act_pipeline.engines.model_files import inspect_model
from act_pipeline.errors import UserError
from act_pipeline.fit import fit_reader
from act_pipeline.model import InferenceModel


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


def model_feed(config: Config, feed_names: Sequence[str], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """Return what gives a reader's batches under the names of the model's inputs."""
    names = list(inspect_model(model).inputs)
    return lambda: (model_feed(config, names, batch) for batch in batches())


def held_out_feeds(config: Config, reader: Reader, model: InferenceModel, images: int) -> list[dict[str, np.ndarray]]:
    """Return training images that no calibration of the config looks at, one a feed; any, where there are too few."""
    settings = config.quant_post
    options = {"batch_size": 1, "shuffle": False, "drop_last": False, "seed": settings.seed, "images": images}
    loader = reader.loader("train", skip=settings.images, **options)
    if len(loader) < images:
        loader = reader.loader("train", **options)
    names = list(inspect_model(model).inputs)
    with contextlib.closing(iter(loader)) as batches:
        return [model_feed(config, names, batch) for batch in batches]
