"""Compare INT8 models with the float model on training images that are held out of calibration and training."""

from __future__ import annotations

import functools
from typing import Optional

import numpy as np

from act_pipeline.calibration.feeds import held_out_feeds
from act_pipeline.compress.judging.judge import Detected, Judge
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.evaluation import detection_change


class HeldOut:
    """The held-out training images, and the float model's detections on them.

    A choice made with this measure does not use the evaluation images. Images are read, and the float model is run,
    when they are first needed.
    """

    def __init__(self, config: Config, reader: Reader, judge: Judge, model: InferenceModel) -> None:
        """Store what the detections are computed with.

        Args:
            config: the compression config.
            reader: the data.
            judge: runs the models.
            model: the float model.
        """
        self._config, self._reader, self._judge, self._model = config, reader, judge, model
        self._exact = Detected(np.zeros((0, 7)))
        self._exact_images = 0

    @functools.cached_property
    def feeds(self) -> list[dict[str, np.ndarray]]:
        """Feeds of one image each, see `calibration.feeds.held_out`."""
        return held_out_feeds(self._config, self._reader, self._model)

    def change(self, model: InferenceModel, images: Optional[int] = None) -> float:
        """Return the distance of an INT8 model's detections from the float model's.

        Args:
            model: the INT8 model.
            images: how many of the images to use, from the first on; None: all.

        Returns:
            The distance in [0, 1]; see :func:`act_pipeline.evaluation.detection_change`.
        """
        feeds = self.feeds[:images]
        if self._exact_images < len(feeds):
            self._exact = self._judge.detect(self._model, "fp32", self._reader, feeds)
            self._exact_images = len(feeds)
        exact = self._exact.first(len(feeds))
        found = self._judge.detect(model, "int8", self._reader, feeds)
        masks = None if exact.masks is None or found.masks is None else (exact.masks, found.masks)
        return detection_change(exact.rows, found.rows, masks=masks)
