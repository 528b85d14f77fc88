"""Computation of intermediate tensors of a float graph, by OpenVINO where installed, otherwise Paddle Inference."""

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
    """A loaded model whose outputs may be any tensors.

    Attributes:
        single: whether :meth:`run` takes batches of one image only.
    """

    single: bool

    def run(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Iterator[np.ndarray]]:
        """Yield the outputs of each batch in the model's order.

        Args:
            batches: the model's inputs by name; arrays of other names are ignored.

        Yields:
            An iterator over the outputs of one batch, valid until the next batch is requested.

        Raises:
            UserError: the runtime fails on a batch.
        """

    def close(self) -> None:
        """Free the model."""


def create_tensor_runner(model: InferenceModel, device: str = "CPU") -> TensorRunner:
    """Load a float model whose outputs are the tensors to compute.

    Args:
        model: the model, see :func:`act_pipeline.calibration.collector.expose`.
        device: ``CPU`` or ``GPU``.

    Returns:
        OpenVINO on the CPU if it is installed and loads the model, otherwise Paddle Inference.

    Raises:
        UserError: no runtime loads the model.
    """
    from act_pipeline.engines.paddle.tensors import PaddleTensors

    if device == "CPU" and find_support("openvino", "fp32", "CPU").available:
        from act_pipeline.engines.onnx_runtimes.openvino_tensors import OpenVINOTensors

        try:
            return OpenVINOTensors(model)
        except UserError as error:  # such as an op without a rule for ONNX export; Paddle runs every Paddle op
            _logger.info("reading tensors in Paddle Inference: %s", error)
    return PaddleTensors(model, device)
