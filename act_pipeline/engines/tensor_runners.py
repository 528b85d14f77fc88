"""What reads tensors from within a float graph on this machine: OpenVINO where it is, Paddle Inference elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.registry import find_support

_logger = logging.getLogger(__name__)


class TensorRunner(Protocol):
    """A model whose outputs may be any tensors.

    Attributes:
        single: it takes batches of one image.
    """

    single: bool

    def run(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Iterator[np.ndarray]]:
        """Yield for each batch its outputs in the model's order; they are valid until the next batch is asked for."""

    def close(self) -> None:
        """Free the model."""


def create_tensor_runner(model: InferenceModel, device: str = "CPU") -> TensorRunner:
    """Load a float model whose outputs are the tensors that are wanted.

    Args:
        model: see :func:`act_pipeline.calibration.collector.expose`.
        device: ``CPU`` or ``GPU``.

    Raises:
        UserError: no runtime takes the model.
    """
    from act_pipeline.engines.paddle.tensors import PaddleTensors

    if device == "CPU" and find_support("openvino", "fp32", "CPU").available:
        from act_pipeline.engines.onnx_runtimes.openvino_tensors import OpenVINOTensors

        try:
            return OpenVINOTensors(model)
        except UserError as error:  # an op that has no rule for ONNX; Paddle runs whatever Paddle wrote
            _logger.info("reading tensors in Paddle Inference: %s", error)
    return PaddleTensors(model, device)
