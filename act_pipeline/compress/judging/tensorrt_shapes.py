"""Collect the shapes of a model's tensors for TensorRT in Paddle."""

from __future__ import annotations

import logging
from multiprocessing import get_context

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.reader_settings import ReaderSettings

_logger = logging.getLogger(__name__)


def collect_shapes(model: InferenceModel, reader: Reader, device: str) -> None:
    """Collect ``dynamic_shape.txt`` for TensorRT in Paddle in a separate process, unless it exists and is valid.

    Paddle 2.6.2 cannot build TensorRT engines in the process that collected the shapes.

    Args:
        model: the model, in whose folder the file is written.
        reader: the data to run.
        device: ``CPU`` or ``GPU``.

    Raises:
        UserError: the process failed.
    """
    process = get_context("spawn").Process(target=_collect_shapes, args=(model, reader.settings, device))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise UserError(
            f"the shapes of {model.directory} could not be collected for paddle_trt; run deploy/infer_eval.py "
            f"--collect_shape_only=True --model_path={model.directory}, which says why"
        )


def _collect_shapes(model: InferenceModel, settings: ReaderSettings, device: str) -> None:
    from act_pipeline.inference import InferenceRequest, run_inference

    request = InferenceRequest(
        str(model.directory), model.model_filename, model.params_filename, device=device, collect_shape_only=True
    )
    run_inference(request, say=_logger.info, reader=Reader(settings))
