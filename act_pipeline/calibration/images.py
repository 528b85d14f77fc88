"""The images that a model is calibrated on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from act_pipeline.config import QuantPost
from act_pipeline.data import Reader

_logger = logging.getLogger(__name__)


def calibration_batches(
    reader: Reader, settings: QuantPost, progress: bool = True
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """Return what gives the calibration images: of the train split, chosen at random from a seed.

    Fewer than asked for are used all, and that is said.

    Raises:
        UserError: there are none.
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
            "%s: TrainDataset has %d images, %d were asked for (QuantPost.%s); calibrating on all of them",
            reader.path,
            found,
            settings.images,
            "calib_images" if settings.batch_nums is None else "batch_nums",
        )

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        from tqdm import tqdm

        with contextlib.closing(iter(loader)) as images:
            yield from tqdm(
                images, total=len(loader), desc="calibrate", unit="batch", disable=not progress, leave=False
            )

    return batches
