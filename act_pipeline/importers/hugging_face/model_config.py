"""``config.json`` of RT-DETR in ``transformers`` as the content of a PaddleDetection model config.

Where a value of ``config.json`` means other arithmetic than PaddleDetection's modules have, the model is refused: its
detections would silently be others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.export import COCO_CLASSES, coco_class_names
from act_pipeline.importers.hugging_face.backbone import backbone_section
from act_pipeline.importers.hugging_face.values import VIA_ONNX, count, int_list, positive, require, shown

MODEL_TYPES = ("rt_detr", "rt_detr_v2")
_LEVELS = 3
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
_ACTIVATIONS = ("relu", "gelu", "silu")
_ENCODER_LAYERS = r"model\.encoder\.(?:aifi|encoder)\.0\.layers\."
# Key -> its default in transformers, and the tensor (and axis) whose length it is.
_LENGTHS: dict[str, tuple[int, str, int]] = {
    "d_model": (256, r"model\.enc_score_head\.weight", 1),
    "encoder_hidden_dim": (256, r"model\.encoder_input_proj\.0\.0\.weight", 0),
    "encoder_ffn_dim": (1024, rf"{_ENCODER_LAYERS}0\.(?:mlp\.)?fc1\.weight", 0),
    "decoder_ffn_dim": (1024, r"model\.decoder\.layers\.0\.(?:mlp\.)?fc1\.weight", 0),
}
# Key -> its default, and the names whose numbers it counts.
_COUNTS: dict[str, tuple[int, str]] = {
    "encoder_layers": (1, rf"{_ENCODER_LAYERS}(\d{{1,3}})\."),
    "decoder_layers": (6, r"model\.decoder\.layers\.(\d{1,3})\."),
}
_POINTS = "model.decoder.layers.0.encoder_attn.attention_weights.bias"
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
            f"{where}: key 'model_type' is {shown(model_type)}, expected {' or '.join(MODEL_TYPES)}; {VIA_ONNX}"
        )
    require(config, _FIXED, where)
    hidden, decoder_dim = count(config, "encoder_hidden_dim", 256, where), count(config, "d_model", 256, where)
    layers = int_list(config, "encode_proj_layers", [2], where)
    if not layers or len(set(layers)) != len(layers) or max(layers) >= _LEVELS:
        raise UserError(f"{where}: key 'encode_proj_layers' is {layers}, expected indices of the {_LEVELS} levels")
    expansion = positive(config, "hidden_expansion", 1.0, where)
    queries = count(config, "num_queries", 300, where)
    feedforward = count(config, "decoder_ffn_dim", 1024, where)
    backbone, arguments = backbone_section(config, where)
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
            "num_encoder_layers": count(config, "encoder_layers", 1, where),
            "encoder_layer": {
                "name": "TransformerLayer",
                "d_model": hidden,
                "nhead": _heads(config, "encoder_attention_heads", hidden, where),
                "dim_feedforward": count(config, "encoder_ffn_dim", 1024, where),
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
            "num_decoder_points": count(config, "decoder_n_points", 4, where),
            "nhead": _heads(config, "decoder_attention_heads", decoder_dim, where),
            "num_decoder_layers": count(config, "decoder_layers", 6, where),
            "dim_feedforward": feedforward,
            "activation": _activation(config, "decoder_activation_function", "relu", where),
            "learnt_init_query": False,
        },
        "DETRPostProcess": {"num_top_queries": queries},
    }


def check_lengths(config: Mapping[str, Any], where: str, tensors: Mapping[str, np.ndarray], weights: str) -> None:
    """Compare the sizes of ``config.json`` with the tensors, before a model of these sizes is built.

    Args:
        config: content of ``config.json``, checked by :func:`model_content`.
        where: the file, for messages.
        tensors: name in ``transformers`` -> array.
        weights: the file of the tensors, for messages.

    Raises:
        UserError: a tensor that a size stands for is missing, or has another length.
    """
    found: dict[str, tuple[int, int]] = {}
    for key, (default, name, axis) in _LENGTHS.items():
        array = next((array for other, array in tensors.items() if re.fullmatch(name, other)), None)
        found[key] = (count(config, key, default, where), 0 if array is None or array.ndim < 2 else array.shape[axis])
    for key, (default, pattern) in _COUNTS.items():
        layers = {int(match[1]) for match in (re.match(pattern, name) for name in tensors) if match}
        found[key] = (count(config, key, default, where), max(layers, default=-1) + 1)
    heads = count(config, "decoder_attention_heads", 8, where)
    points = tensors[_POINTS].size if _POINTS in tensors else 0
    found["decoder_n_points"] = (count(config, "decoder_n_points", 4, where), points // (heads * _LEVELS))
    for key, (wanted, length) in found.items():
        if wanted != length:
            raise UserError(
                f"{where}: key '{key}' is {wanted}, {weights} has {length}; copy both files of one training"
            )


def offset_scale(config: Mapping[str, Any], where: str) -> float:
    """Return RT-DETRv2's scale of the sampling offsets relative to that of RT-DETR, 0.5.

    Args:
        config: content of ``config.json``.
        where: the file, for messages.

    Raises:
        UserError: ``decoder_offset_scale`` is no positive number.
    """
    return positive(config, "decoder_offset_scale", 0.5, where) / 0.5


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


def _heads(config: Mapping[str, Any], key: str, channels: int, where: str) -> int:
    heads = count(config, key, 8, where)
    if channels % heads:
        raise UserError(f"{where}: key '{key}' is {heads}, expected a divisor of the {channels} channels")
    return heads


def _activation(config: Mapping[str, Any], key: str, default: str, where: str) -> str:
    value = config.get(key, default)
    if value not in _ACTIVATIONS:
        raise UserError(f"{where}: key '{key}' is {shown(value)}, expected {', '.join(_ACTIVATIONS)}; {VIA_ONNX}")
    return value


def _is_name(value: Any) -> bool:
    # JSON can hold halves of characters, which no text file can.
    return isinstance(value, str) and bool(value.strip()) and value.encode("utf-8", "ignore").decode() == value
