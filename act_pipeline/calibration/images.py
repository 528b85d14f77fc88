"""The calibration images: a random choice from the train split."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np

from act_pipeline.config import QuantPost
from act_pipeline.core.progress import each
from act_pipeline.data import Reader

_logger = logging.getLogger(__name__)


def calibration_batches(
    reader: Reader, settings: QuantPost, progress: bool = True, *, stage: str = "calibrate", most: int | None = None
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """Return a function that yields the calibration images, chosen at random from the train split.

    If the split has fewer images than ``settings.images``, all of them are used and a warning is logged.

    Args:
        reader: the data.
        settings: ``images``, ``batch_size`` and ``seed``.
        progress: show a progress bar on stderr.
        stage: what the progress bar says.
        most: how many of the images are wanted at most; None: all.

    Returns:
        A function whose every call yields the same batches: reader's name -> array.

    Raises:
        UserError: the split has no readable image.
    """
    loader = reader.loader(
        "train",
        batch_size=settings.batch_size,
        shuffle=False,
        drop_last=False,
        seed=settings.seed,
        images=settings.images,
    )
    found = loader.dataset.readable()
    if found < settings.images:
        _logger.warning(
            "%s: TrainDataset has %d images, %d are required by the config (QuantPost.%s); calibrating on all of them",
            reader.path,
            found,
            settings.images,
            "calib_images" if settings.batch_nums is None else "batch_nums",
        )

    batches_wanted = len(loader) if most is None else min(len(loader), -(-most // settings.batch_size))

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        with contextlib.closing(iter(loader)) as images:
            yield from each(islice(images, batches_wanted), stage, "batch", batches_wanted, shown=progress)

    return batches
