"""Hugging Face's ``config.json`` and ``preprocessor_config.json`` of RT-DETR as the content of a PaddleDetection config.

Where a value of ``config.json`` means other arithmetic than PaddleDetection's modules have, the model is refused: its
detections would silently be others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number
from act_pipeline.export import COCO_CLASSES, coco_class_names

MODEL_TYPES = ("rt_detr", "rt_detr_v2")
VIA_ONNX = "export the model to ONNX, and import that with --onnx"
_DEFAULT_SIZE = (640, 640)
_LEVELS = 3
_MAX_COUNT = 1 << 16
_MAX_JSON_BYTES = 4 << 20
# What the modules here compute: other values mean another model. Missing keys have transformers' defaults, the same.
_FIXED: dict[str, Any] = {
    "activation_function": "silu",
    "normalize_before": False,
    "with_box_refine": True,
    "learn_initial_query": False,  # transformers 5.24 cannot run such a model
    "eval_size": None,  # with a value, transformers leaves out the position embedding
    "positional_encoding_temperature": 10000,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "num_feature_levels": _LEVELS,
    "feat_strides": [8, 16, 32],
    "decoder_n_levels": _LEVELS,
    "decoder_method": "default",
    "use_timm_backbone": False,
}
_FIXED_RESNET: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_FIXED_HGNET: dict[str, Any] = {
    "num_channels": 3,
    "hidden_act": "relu",
    "stem_strides": [2, 1, 1, 2, 1],
    "stage_downsample": [False, True, True, True],
    "stage_downsample_strides": [2, 2, 2, 2],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "use_learnable_affine_block": False,
}
# transformers' defaults, those of PP-HGNetV2-L.
_HGNET_DEFAULTS: dict[str, list[int]] = {
    "stem_channels": [3, 32, 48],
    "stage_in_channels": [48, 128, 512, 1024],
    "stage_mid_channels": [48, 96, 192, 384],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [6, 6, 6, 6],
}
_RESNET_WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
_RESNET_DEPTHS = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
_ACTIVATIONS = ("relu", "gelu", "silu")
_OUTPUTS = {"out_indices": [2, 3, 4], "out_features": ["stage2", "stage3", "stage4"]}
# Pillow's numbers of interpolations, which transformers has, to OpenCV's.
_OPENCV_INTERPOLATION = {0: 0, 1: 4, 2: 1, 3: 2, 4: 3}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_PLACEHOLDER = re.compile(r"LABEL_\d+")
# The published COCO models have six names as Darknet wrote them; COCO's annotation files have these.
_COCO_NAMES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {_MAX_JSON_BYTES >> 20} MiB, expected a config of transformers")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy the whole folder of the model") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected an object with model_type; download it again")
    return content


def model_content(config: Mapping[str, Any], where: str, num_classes: int) -> dict[str, Any]:
    """Return the content of the PaddleDetection model config that describes the same model.

    Args:
        config: content of ``config.json``.
        where: the file, for messages.
        num_classes: number of classes of the weights.

    Raises:
        UserError: the model is no RT-DETR, or has a part that PaddleDetection's RT-DETR does not have.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: key 'model_type' is {_shown(model_type)}, expected {' or '.join(MODEL_TYPES)}; {VIA_ONNX}"
        )
    _require(config, _FIXED, where)
    hidden, decoder_dim = _count(config, "encoder_hidden_dim", 256, where), _count(config, "d_model", 256, where)
    layers = _list(config, "encode_proj_layers", [2], where)
    if not layers or len(set(layers)) != len(layers) or max(layers) >= _LEVELS:
        raise UserError(f"{where}: key 'encode_proj_layers' is {layers}, expected indices of the {_LEVELS} levels")
    expansion = _positive(config, "hidden_expansion", 1.0, where)
    queries = _count(config, "num_queries", 300, where)
    feedforward = _count(config, "decoder_ffn_dim", 1024, where)
    backbone, arguments = _backbone(config, where)
    return {
        "architecture": "DETR",
        "num_classes": num_classes,
        "use_focal_loss": True,
        "hidden_dim": decoder_dim,
        "norm_type": "bn",
        "trt": True,
        "DETR": {
            "backbone": backbone,
            "neck": "HybridEncoder",
            "transformer": "RTDETRTransformer",
            "detr_head": "DINOHead",
            "post_process": "DETRPostProcess",
        },
        backbone: arguments,
        "HybridEncoder": {
            "hidden_dim": hidden,
            "use_encoder_idx": layers,
            "num_encoder_layers": _count(config, "encoder_layers", 1, where),
            "encoder_layer": {
                "name": "TransformerLayer",
                "d_model": hidden,
                "nhead": _heads(config, "encoder_attention_heads", hidden, where),
                "dim_feedforward": _count(config, "encoder_ffn_dim", 1024, where),
                "dropout": 0.0,
                "activation": _activation(config, "encoder_activation_function", "gelu", where),
            },
            "expansion": expansion,
        },
        "RTDETRTransformer": {
            "hidden_dim": decoder_dim,
            "num_queries": queries,
            "feat_strides": [8, 16, 32],
            "num_levels": _LEVELS,
            "num_decoder_points": _count(config, "decoder_n_points", 4, where),
            "nhead": _heads(config, "decoder_attention_heads", decoder_dim, where),
            "num_decoder_layers": _count(config, "decoder_layers", 6, where),
            "dim_feedforward": feedforward,
            "activation": _activation(config, "decoder_activation_function", "relu", where),
            "learnt_init_query": False,
        },
        "DETRPostProcess": {"num_top_queries": queries},
    }


def offset_scale(config: Mapping[str, Any], where: str) -> float:
    """Return RT-DETRv2's scale of the sampling offsets relative to that of RT-DETR, 0.5.

    Args:
        config: content of ``config.json``.
        where: the file, for messages.

    Raises:
        UserError: ``decoder_offset_scale`` is no positive number.
    """
    return _positive(config, "decoder_offset_scale", 0.5, where) / 0.5


def class_names(config: Mapping[str, Any], where: str, num_classes: int) -> list[str] | None:
    """Return the class names of ``id2label`` in the order of the logits.

    Args:
        config: content of ``config.json``.
        where: the file, for messages.
        num_classes: number of classes of the weights.

    Returns:
        the names, those of COCO as its annotation files have them; None if there are none, or only ``LABEL_0``, ...

    Raises:
        UserError: ``id2label`` does not name the classes 0 to ``num_classes - 1``.
    """
    labels = config.get("id2label")
    if labels is None:
        return None
    expected = [str(index) for index in range(num_classes)]
    if not isinstance(labels, dict) or sorted(labels) != sorted(expected) or not all(map(_is_name, labels.values())):
        found = f"{len(labels)} names" if isinstance(labels, dict) else type(labels).__name__
        raise UserError(
            f"{where}: key 'id2label' has {found}, expected one for each class of the weights, '0' to "
            f"'{num_classes - 1}'; correct it, or copy config.json and model.safetensors of one training"
        )
    names = [labels[index] for index in expected]
    if all(map(_PLACEHOLDER.fullmatch, names)):
        return None
    as_coco = [_COCO_NAMES.get(name, name) for name in names]
    return as_coco if num_classes == COCO_CLASSES and as_coco == coco_class_names() else names


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
    if size is None and (not all(map(_is_count, own)) or preprocessor.get("do_resize", True) is not True):
        raise UserError(
            f"{where}: key 'size' is {_shown(given)}, 'do_resize' {_shown(preprocessor.get('do_resize', True))}, "
            "expected height and width of one input size, and true; give the input size yourself"
        )
    height, width = own if size is None else size
    if anchor_size is not None and list(anchor_size if isinstance(anchor_size, list) else []) != [height, width]:
        raise UserError(
            f"the input size is {height} x {width}, key 'anchor_image_size' of config.json {_shown(anchor_size)}, "
            "expected null or the same"
        )
    resample = preprocessor.get("resample", 2)
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in _OPENCV_INTERPOLATION:
        raise UserError(f"{where}: key 'resample' is {_shown(resample)}, expected a number of Pillow from 0 to 4")
    padded = preprocessor.get("pad_size")
    if preprocessor.get("do_pad") and padded is not None and padded != given:
        raise UserError(
            f"{where}: key 'pad_size' is {_shown(padded)}, expected null, or the same as 'size'; {VIA_ONNX}"
        )
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
        raise UserError(f"{where}: key 'rescale_factor' is {_shown(factor)}, expected 1 / 255; {VIA_ONNX}")
    values: dict[str, list[float]] = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    for key, default in _IMAGENET.items() if normalizes else ():
        given = preprocessor.get(key, default)
        numbers = [as_number(value) for value in given] if isinstance(given, list) else []
        if len(numbers) != 3 or None in numbers or (key == "image_std" and not all(numbers)):
            raise UserError(f"{where}: key '{key}' is {_shown(given)}, expected three numbers, no std 0")
        values[key] = [float(number) for number in numbers if number is not None]
    kind = "mean_std" if normalizes else "none"
    return {"mean": values["image_mean"], "std": values["image_std"], "is_scale": rescales, "norm_type": kind}


def _backbone(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return module and arguments of the backbone."""
    section = config.get("backbone_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: key 'backbone_config' is {_shown(section)}, expected an object")
    if config.get("backbone") is not None:
        raise UserError(
            f"{where}: key 'backbone' is {_shown(config['backbone'])}, expected null and a backbone_config; {VIA_ONNX}"
        )
    where, kind = f"{where}: backbone_config", section.get("model_type", "rt_detr_resnet")
    for key, expected in _OUTPUTS.items():
        if section.get(key) is not None and section[key] != expected:
            raise UserError(f"{where}.{key} is {_shown(section[key])}, expected {expected}; {VIA_ONNX}")
    trained = {"return_idx": [1, 2, 3], "freeze_at": -1, "freeze_norm": False}
    if kind == "rt_detr_resnet":
        _require(section, _FIXED_RESNET, where)
        return "ResNet", {"depth": _resnet_depth(section, where), "variant": "d", "norm_decay": 0.0, **trained}
    if kind == "hgnet_v2":
        _require(section, _FIXED_HGNET, where)
        return "PPHGNetV2", {"arch": _hgnet_architecture(section, where), "freeze_stem_only": False, **trained}
    raise UserError(
        f"{where}.model_type is {_shown(kind)}, expected rt_detr_resnet (ResNet-vd) or hgnet_v2 (PP-HGNetV2); {VIA_ONNX}"
    )


def _resnet_depth(section: Mapping[str, Any], where: str) -> int:
    kind, depths = section.get("layer_type", "bottleneck"), _list(section, "depths", [3, 4, 6, 3], where)
    depth = _RESNET_DEPTHS.get((kind if isinstance(kind, str) else "", tuple(depths)))
    if depth is None:
        known = ", ".join(f"{layer} {list(blocks)}" for layer, blocks in _RESNET_DEPTHS)
        raise UserError(
            f"{where}: layer_type and depths are {_shown(kind)} {depths}, expected one of {known}; {VIA_ONNX}"
        )
    widths = _list(section, "hidden_sizes", _RESNET_WIDTHS["bottleneck"], where)
    if widths != _RESNET_WIDTHS[kind]:
        raise UserError(
            f"{where}: hidden_sizes are {widths}, expected {_RESNET_WIDTHS[kind]} of layer_type {kind}; {VIA_ONNX}"
        )
    return depth


def _hgnet_architecture(section: Mapping[str, Any], where: str) -> str:
    from act_pipeline.rtdetr.backbone import ARCHITECTURES

    found = {key: _list(section, key, default, where) for key, default in _HGNET_DEFAULTS.items()}
    for name, architecture in ARCHITECTURES.items():
        stages = architecture.stages
        if found == {
            "stem_channels": list(architecture.stem),
            "stage_in_channels": [stage.in_channels for stage in stages],
            "stage_mid_channels": [stage.mid_channels for stage in stages],
            "stage_out_channels": [stage.out_channels for stage in stages],
            "stage_num_blocks": [stage.blocks for stage in stages],
            "stage_numb_of_layers": [stage.layers for stage in stages],
        }:
            return name
    raise UserError(
        f"{where}: stage_out_channels {found['stage_out_channels']} and the other widths and depths are those of none "
        f"of PP-HGNetV2's {', '.join(ARCHITECTURES)}; {VIA_ONNX}"
    )


def _require(section: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, expected in fixed.items():
        found = section.get(key, expected)
        same = found == expected and isinstance(found, bool) == isinstance(expected, bool)
        if not same and not (
            isinstance(found, float) and isinstance(expected, float) and math.isclose(found, expected)
        ):
            raise UserError(
                f"{where}: key '{key}' is {_shown(found)}, expected {json.dumps(expected)}, as the published RT-DETR "
                f"have it; {VIA_ONNX}"
            )


def _positive(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = as_number(config.get(key, default))
    if value is None or not 0 < value <= 100:
        raise UserError(f"{where}: key '{key}' is {_shown(config[key])}, expected a number such as {default}")
    return value


def _count(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = config.get(key, default)
    if not _is_count(value):
        raise UserError(f"{where}: key '{key}' is {_shown(value)}, expected an integer from 1 to {_MAX_COUNT}")
    return value


def _heads(config: Mapping[str, Any], key: str, channels: int, where: str) -> int:
    heads = _count(config, key, 8, where)
    if channels % heads:
        raise UserError(f"{where}: key '{key}' is {heads}, expected a divisor of the {channels} channels")
    return heads


def _list(config: Mapping[str, Any], key: str, default: list[int], where: str) -> list[int]:
    value = config.get(key, default)
    if not (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(item) is int and 0 <= item <= _MAX_COUNT for item in value)
    ):
        raise UserError(f"{where}: key '{key}' is {_shown(value)}, expected a list of integers")
    return list(value)


def _activation(config: Mapping[str, Any], key: str, default: str, where: str) -> str:
    value = config.get(key, default)
    if value not in _ACTIVATIONS:
        raise UserError(f"{where}: key '{key}' is {_shown(value)}, expected {', '.join(_ACTIVATIONS)}; {VIA_ONNX}")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_COUNT


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)) and len(value) > 6:
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = json.dumps(value)
    except RecursionError:
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
