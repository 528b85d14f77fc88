"""The calibration images: a random choice from the train split."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from act_pipeline.config import QuantPost
from act_pipeline.core.progress import each
from act_pipeline.data import Reader

_logger = logging.getLogger(__name__)


def calibration_batches(
    reader: Reader, settings: QuantPost, progress: bool = True
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """Return a function that yields the calibration images, chosen at random from the train split.

    If the split has fewer images than ``settings.images``, all of them are used and a warning is logged.

    Args:
        reader: the data.
        settings: ``images``, ``batch_size`` and ``seed``.
        progress: show a progress bar on stderr.

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

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        with contextlib.closing(iter(loader)) as images:
            yield from each(images, "calibrate", "batch", len(loader), shown=progress)

    return batches
