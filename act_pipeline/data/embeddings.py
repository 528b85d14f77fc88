"""Embeddings of images, the inputs of a mask decoder, made by the image encoder while images are read."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Optional

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines import Engine, create_engine, fastest_engine, inspect_artifact, machine
from act_pipeline.families.interface import PROMPTS
from act_pipeline.families.registry import undecoded
from act_pipeline.families.sam import decoder_inputs

# Samples of one image follow each other, so that few of the last embeddings (0.5 MB to 4 MB each) suffice.
_KEPT = 8


class Embeddings:
    """Adds the inputs of a mask decoder to a batch; the encoder is loaded when it is first needed."""

    def __init__(self, encoder: InferenceModel) -> None:
        self._encoder = encoder
        self._engine: Optional[Engine] = None
        self._lock = threading.Lock()
        self._last: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the inputs of a mask decoder.

        Args:
            batch: ``image`` [N, 3, H, W] and ``prompts`` [N, 1, 5].

        Returns:
            See :func:`act_pipeline.families.sam.decoder_inputs`.

        Raises:
            UserError: the encoder cannot be loaded, or does not take the images.
        """
        with self._lock:
            embeddings = np.concatenate([self._embedding(image[None]) for image in batch["image"]])
        return decoder_inputs(embeddings, batch[PROMPTS][:, 0, 1:])

    def _embedding(self, image: np.ndarray) -> np.ndarray:
        key = hashlib.blake2b(image.tobytes()).hexdigest()
        if key not in self._last:
            if self._engine is None:
                self._engine = self._loaded()
            (self._last[key],) = self._engine.run({"image": image}).values()
            while len(self._last) > _KEPT:
                self._last.popitem(last=False)
        return self._last[key]

    def _loaded(self) -> Engine:
        precision = "int8" if inspect_artifact(self._encoder).quantized else "fp32"
        name, device, _ = fastest_engine(precision, "CPU", machine())
        return create_engine(name, self._encoder, precision, device, decoder=undecoded(self._encoder))
