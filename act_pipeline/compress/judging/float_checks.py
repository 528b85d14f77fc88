"""Checks of the float model that run before the strategy, so that an unusable model or data set is found early."""

from __future__ import annotations

from act_pipeline.calibration.feeds import model_feed
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.data import Reader
from act_pipeline.evaluation import Evaluation
from act_pipeline.evaluation.matching import MIN_SCORE
from act_pipeline.execution.finite_checks import check_float_model
from act_pipeline.graph.model_files import inspect_model, read_program

# The strategies that train, and how ACT's names of a teacher's tensors begin.
_TRAINED = ("qat_dis", "auto")
_TEACHER = "teacher"
# PaddleSlim's tolerance between TrainConfig.origin_metric and the float model's measured mAP.
_ORIGIN_TOLERANCE = 0.05
# A float model below this mAP, on at least this many images and boxes, has not been trained or gets other input than in
# its training.
_LEAST_MAP = 0.01
_TELLING_IMAGES = 5
_TELLING_BOXES = 20


def check_outputs(config: Config, prepared: InferenceModel, reader: Reader) -> None:
    batch = next(iter(reader.loader("train", batch_size=1, shuffle=False)))
    check_float_model(prepared, model_feed(config, list(inspect_model(prepared).inputs), batch))


def check_nodes(config: Config, model: InferenceModel, prepared: InferenceModel) -> None:
    """Refuse tensors to compare in the training that are not computed in the model as it is quantized.

    ACT takes a list whose first name it does not find as pairs of a teacher's and a student's tensor.

    Args:
        config: the compression config.
        model: the model that the user gave.
        prepared: the model that is quantized.

    Raises:
        UserError: a name of ``Distillation.node`` is no tensor of ``prepared``.
    """
    if config.strategy.name not in _TRAINED or config.distillation is None or not config.distillation.node:
        return
    given = [name for each in config.distillation.node for name in (each if isinstance(each, list) else [each])]
    there = _tensors(prepared)
    for name in given:
        if name in there or name.startswith(_TEACHER):
            continue
        what = f"{config.path}: Distillation.node: '{name}'"
        if name in _tensors(model):
            raise UserError(
                f"{what} is not computed in the model as it is quantized, where BatchNorms and some projections are "
                "part of the layers beside them (docs/internals.md); name a tensor after those"
            )
        raise UserError(f"{what} is no tensor of {model.directory}{suggest(name, there)}")


def _tensors(model: InferenceModel) -> set[str]:
    """Return the names of what the ops of a model compute."""
    ops = read_program(model.model_path).blocks[0].ops
    return {name for op in ops for output in op.outputs for name in output.arguments}


def check_limits(config: Config, reader: Reader) -> None:
    """Refuse ``auto`` without the limit that it stops at, where the images have no labels.

    Raises:
        UserError: the strategy is ``auto``, EvalDataset has no labels, and there is no ``Strategy.min_agreement``.
    """
    strategy = config.strategy
    if strategy.name != "auto" or strategy.min_agreement is not None or reader.labelled("eval"):
        return
    raise UserError(
        f"{config.path}: Strategy.min_agreement is missing, expected a number from 0 to 1, 0.9 say: EvalDataset of "
        f"{reader.path} has no labels, so there is no mAP for max_drop, and auto stops at a limit; add it"
    )


def check_origin(config: Config, fp32: Evaluation) -> None:
    origin = config.train_config.origin_metric if config.train_config else None
    if origin is not None and fp32.has_map and abs(fp32.map - origin) > _ORIGIN_TOLERANCE:
        raise UserError(
            f"{config.path}: TrainConfig.origin_metric is {origin}, the float model has {fp32.map:.4f} mAP here; "
            "check the data set, or correct origin_metric"
        )


def check_worth(config: Config, fp32: Evaluation, reader: Reader) -> None:
    """Refuse a float model without accuracy to keep, since every INT8 model of it would be within the limits.

    Args:
        config: the compression config, for the message.
        fp32: the float model's evaluation.
        reader: the data, for the number of labelled boxes.

    Raises:
        UserError: the mAP is below 0.01, on at least 5 images and 20 boxes; without labels, or with
            ``Strategy.min_agreement``, no box has a score of at least 0.3.
    """
    annotations = reader.annotations("eval")
    compared = not fp32.has_map or config.strategy.min_agreement is not None
    if compared and not (fp32.detections[:, 5] >= MIN_SCORE).any():
        raise UserError(
            f"{config.path}: the float model detects nothing with a score of at least {MIN_SCORE} on {fp32.images} "
            f"images ({annotations.path}): there is nothing to compare INT8 with; check that {reader.path} has "
            "images of its classes and the preprocessing that it was trained on, or set Global.Evaluation: false"
        )
    boxes = len(annotations.boxes or ())
    if fp32.has_map and fp32.map < _LEAST_MAP and fp32.images >= _TELLING_IMAGES and boxes >= _TELLING_BOXES:
        raise UserError(
            f"{config.path}: the float model has {fp32.map:.4f} mAP on {fp32.images} images with {boxes} boxes "
            f"({annotations.path}): there is no accuracy to keep; check that {reader.path} has the data and the "
            "preprocessing that it was trained on, or set Global.Evaluation: false"
        )
