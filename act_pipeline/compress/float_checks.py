"""What is found out before the first hour of a compression, not after it."""

from __future__ import annotations

from act_pipeline.calibration.feeds import model_feed
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.evaluation import Evaluation
from act_pipeline.execution.finite_checks import check_float_model
from act_pipeline.graph.model_files import inspect_model

# What Paddle Inference's passes make of convolutions and matmuls (2.6: save_optimized_model, enable_save_optim_model).
# PaddleSlim's own tolerance between TrainConfig.origin_metric and what the float model gives.
_ORIGIN_TOLERANCE = 0.05
# A float model below this mAP on so many images and boxes was fed something else than it was trained on, or was not
# trained.
_LEAST_MAP = 0.01
_TELLING_IMAGES = 5
_TELLING_BOXES = 20


def check_outputs(config: Config, prepared: InferenceModel, reader: Reader) -> None:
    batch = next(iter(reader.loader("train", batch_size=1, shuffle=False)))
    check_float_model(prepared, model_feed(config, list(inspect_model(prepared).inputs), batch))


def check_origin(config: Config, fp32: Evaluation) -> None:
    origin = config.train_config.origin_metric if config.train_config else None
    if origin is not None and abs(fp32.map - origin) > _ORIGIN_TOLERANCE:
        raise UserError(
            f"{config.path}: TrainConfig.origin_metric is {origin}, the float model has {fp32.map:.4f} mAP here; "
            "check the data set, or correct origin_metric"
        )


def check_worth(config: Config, fp32: Evaluation, reader: Reader) -> None:
    """Refuse a float model that finds next to nothing: whatever is done to it is within ``max_drop``.

    Raises:
        UserError: its mAP is below :data:`_LEAST_MAP` on enough images and boxes to say so.
    """
    annotations = reader.annotations("eval")
    boxes = len(annotations.boxes or ())
    if fp32.map < _LEAST_MAP and fp32.images >= _TELLING_IMAGES and boxes >= _TELLING_BOXES:
        raise UserError(
            f"{config.path}: the float model has {fp32.map:.4f} mAP on {fp32.images} images with {boxes} boxes "
            f"({annotations.path}): there is no accuracy to keep; check that {reader.path} has the data and the "
            "preprocessing that it was trained on, or set Global.Evaluation: false"
        )
