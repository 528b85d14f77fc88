"""Compare INT8 models with the float model on training images that are held out of calibration and training."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Optional, TypeVar

import numpy as np

from act_pipeline.calibration.feeds import held_out_feeds
from act_pipeline.compress.judging.judge import Detected, Judge, detections
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.engines import Engine
from act_pipeline.evaluation import detection_change

_Name = TypeVar("_Name")
# Images that :meth:`HeldOut.changes` chooses the models by that are compared on all of them.
_FIRST_IMAGES = 8


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
        exact = self._exact_on(len(feeds))
        return _change(exact, self._judge.detect(model, "int8", self._reader, feeds))

    def changes(self, models: Iterable[tuple[_Name, InferenceModel]], finalists: int) -> dict[_Name, float]:
        """Return the distances of the best ones of several INT8 models; see :meth:`change`.

        The first images choose which ones run on the others too (successive halving); at most one model more than
        these is loaded at a time.

        Args:
            models: name and model, each in its turn.
            finalists: how many models run on all images.

        Returns:
            Name -> distance on all images, of the finalists, in the order of ``models``; of all models where there are
            no more images than the first ones.
        """
        exact = self._exact_on(len(self.feeds))
        few, others = self.feeds[:_FIRST_IMAGES], self.feeds[_FIRST_IMAGES:]
        if not others:
            return {name: self.change(model) for name, model in models}
        running: dict[_Name, tuple[float, Detected, Engine]] = {}
        try:
            for name, model in models:
                engine = self._judge.load(model, "int8", self._reader)
                try:
                    seen = detections(engine, few)
                except BaseException:
                    engine.close()
                    raise
                running[name] = (_change(exact.first(len(few)), seen), seen, engine)
                if len(running) > finalists:
                    worst = max(running, key=lambda one: running[one][0])
                    running.pop(worst)[2].close()
            return {
                name: _change(exact, seen.followed_by(detections(engine, others), len(few)))
                for name, (_, seen, engine) in running.items()
            }
        finally:
            for _, _, engine in running.values():
                engine.close()

    def _exact_on(self, images: int) -> Detected:
        """Return the float model's detections on the first images."""
        if self._exact_images < images:
            self._exact = self._judge.detect(self._model, "fp32", self._reader, self.feeds[:images])
            self._exact_images = images
        return self._exact.first(images)


def _change(exact: Detected, found: Detected) -> float:
    masks = None if exact.masks is None or found.masks is None else (exact.masks, found.masks)
    return detection_change(exact.rows, found.rows, masks=masks)
