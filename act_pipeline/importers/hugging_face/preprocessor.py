"""``preprocessor_config.json`` as the ``TestReader`` of a PaddleDetection config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number
from act_pipeline.importers.hugging_face.values import VIA_ONNX, is_count, shown

_DEFAULT_SIZE = (640, 640)
# Pillow's numbers of interpolations, which transformers has, to OpenCV's.
_OPENCV_INTERPOLATION = {0: 0, 1: 4, 2: 1, 3: 2, 4: 3}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def input_section(
    preprocessor: Mapping[str, Any], where: str, anchor_size: Any, size: Sequence[int] | None
) -> dict[str, Any]:
    """Return the ``TestReader`` section: input size, resizing and normalization.

    Args:
        preprocessor: content of ``preprocessor_config.json``; empty where there is none, which means transformers'
            defaults: 640 x 640, bilinear, pixels / 255.
        where: the file, for messages.
        anchor_size: ``anchor_image_size`` of ``config.json``, for which the anchors are made; None for any.
        size: height and width of the input in pixels that the user wants; None for the model's.

    Raises:
        UserError: the preprocessing is none that PaddleDetection's reader has.
    """
    given = preprocessor.get("size", dict(zip(("height", "width"), _DEFAULT_SIZE)))
    own = [given.get("height"), given.get("width")] if isinstance(given, dict) else [None, None]
    if size is None and (not all(map(is_count, own)) or preprocessor.get("do_resize", True) is not True):
        raise UserError(
            f"{where}: key 'size' is {shown(given)}, 'do_resize' {shown(preprocessor.get('do_resize', True))}, "
            "expected height and width of one input size, and true; give the input size yourself"
        )
    height, width = own if size is None else size
    if anchor_size is not None and list(anchor_size if isinstance(anchor_size, list) else []) != [height, width]:
        raise UserError(
            f"the input size is {height} x {width}, key 'anchor_image_size' of config.json {shown(anchor_size)}, "
            "expected null or the same"
        )
    resample = preprocessor.get("resample", 2)
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in _OPENCV_INTERPOLATION:
        raise UserError(f"{where}: key 'resample' is {shown(resample)}, expected a number of Pillow from 0 to 4")
    padded = preprocessor.get("pad_size")
    if preprocessor.get("do_pad") and padded is not None and padded != given:
        raise UserError(f"{where}: key 'pad_size' is {shown(padded)}, expected null or 'size' again; {VIA_ONNX}")
    return {
        "inputs_def": {"image_shape": [3, height, width]},
        "sample_transforms": [
            {"Decode": {}},
            {
                "Resize": {
                    "target_size": [height, width],
                    "keep_ratio": False,
                    "interp": _OPENCV_INTERPOLATION[resample],
                }
            },
            {"NormalizeImage": _normalization(preprocessor, where)},
            {"Permute": {}},
        ],
    }


def _normalization(preprocessor: Mapping[str, Any], where: str) -> dict[str, Any]:
    rescales, normalizes = preprocessor.get("do_rescale", True), preprocessor.get("do_normalize", False)
    if not isinstance(rescales, bool) or not isinstance(normalizes, bool):
        raise UserError(f"{where}: keys 'do_rescale' and 'do_normalize' are no booleans, expected true or false")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if rescales and not math.isclose(as_number(factor) or 0.0, 1 / 255, rel_tol=1e-4):
        raise UserError(f"{where}: key 'rescale_factor' is {shown(factor)}, expected 1 / 255; {VIA_ONNX}")
    values: dict[str, list[float]] = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    for key, default in _IMAGENET.items() if normalizes else ():
        given = preprocessor.get(key, default)
        numbers = [as_number(value) for value in given] if isinstance(given, list) else []
        if len(numbers) != 3 or None in numbers or (key == "image_std" and not all(numbers)):
            raise UserError(f"{where}: key '{key}' is {shown(given)}, expected three numbers, no std 0")
        values[key] = [float(number) for number in numbers if number is not None]
    kind = "mean_std" if normalizes else "none"
    return {"mean": values["image_mean"], "std": values["image_std"], "is_scale": rescales, "norm_type": kind}
