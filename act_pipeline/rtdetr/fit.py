"""Checks that the parts of a model config fit each other and the input size, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.rtdetr.ppyoloe import EXPORTABLE, check_ppyoloe, is_ppyoloe

_FLAGS = ("exclude_post_process", "exclude_nms", "with_mask", "trt")
_PARTS = ("backbone", "neck", "transformer", "detr_head", "post_process")


def check_config(source: str, config: Mapping[str, Any]) -> None:
    """Check what can be checked without building the model.

    Args:
        source: the config, for messages.
        config: its content.

    Raises:
        UserError: the detector is of another kind than those that can be exported, a part is not a module name or its
            section not a mapping, ``num_classes`` is not a positive integer, a flag is not a bool, or an RT-DETR does
            not use focal loss.
    """
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise UserError(f"{source}: key 'architecture' is {architecture!r}, expected a model such as DETR")
    ppyoloe = is_ppyoloe(config)
    if not ppyoloe and "RTDETRTransformer" not in str(config.get(architecture, {})):
        raise UserError(
            f"{source}: architecture {architecture} with these parts cannot be exported here, expected {EXPORTABLE}; "
            "export it with PaddleDetection's tools/export_model.py and compress that folder"
        )
    num_classes = config.get("num_classes", 1)
    if not _is_count(num_classes):
        raise UserError(f"{source}: key 'num_classes' is {num_classes!r}, expected a positive integer")
    if not ppyoloe and config.get("use_focal_loss") is not True:
        raise UserError(
            f"{source}: key 'use_focal_loss' is {config.get('use_focal_loss')!r}, expected True: RT-DETR has no score "
            "for 'no object', which the other loss needs"
        )
    for name in _FLAGS:
        if not isinstance(config.get(name, False), bool):
            raise UserError(f"{source}: key '{name}' is {config[name]!r}, expected True or False")
    if ppyoloe:
        check_ppyoloe(source, config)
        return
    section = config[architecture]
    if not isinstance(section, Mapping):
        raise UserError(f"{source}: key '{architecture}' is {section!r}, expected 'key: value' lines")
    for part in _PARTS:
        if part not in section or (part == "neck" and section[part] is None):
            continue
        module = section[part]
        if not isinstance(module, str):
            raise UserError(f"{source}: key '{architecture}.{part}' is {module!r}, expected the name of a module")
        if module in config and not isinstance(config[module], Mapping):
            raise UserError(
                f"{source}: key '{module}' is {config[module]!r}, expected 'key: value' lines; delete it for the "
                "defaults"
            )


def check_model(source: str, model: Any, size: tuple[int, int]) -> None:
    """Check that the model has enough encoder tokens for its queries, and enough query scores for its output boxes.

    Args:
        source: the config, for messages.
        model: a model from `build_model`.
        size: height and width of the input in pixels, multiples of the coarsest stride.

    Raises:
        UserError: there are too few.
    """
    transformer, post_process = model.transformer, model.post_process
    tokens = sum((size[0] // stride) * (size[1] // stride) for stride in transformer.feat_strides)
    queries, classes = transformer.num_queries, transformer.num_classes
    if queries > tokens:
        raise UserError(
            f"{source}: RTDETRTransformer.num_queries is {queries}, but at {size[0]} x {size[1]} the encoder gives "
            f"{tokens} places to choose from; lower it to {tokens}, or export a larger input"
        )
    groups = getattr(post_process, "dual_groups", 0) if getattr(post_process, "dual_queries", False) else 0
    boxes, most = getattr(post_process, "num_top_queries", 0), queries // (groups + 1) * classes
    if not model.exclude_post_process and boxes > most:
        of_groups = f" in the first of {groups + 1} groups" if groups else ""
        raise UserError(
            f"{source}: DETRPostProcess.num_top_queries is {boxes}, but {queries} queries{of_groups} of {classes} "
            f"classes give {most} boxes; lower it"
        )


def require_count(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``least``.

    Args:
        name: the config key, for the message.
        value: the value.
        least: the minimum.

    Raises:
        ValueError: it is not.
    """
    if not _is_count(value, least):
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return value


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
