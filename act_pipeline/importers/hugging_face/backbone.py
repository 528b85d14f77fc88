"""``backbone_config``: ResNet-vd and PP-HGNetV2 as PaddleDetection names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.paddledet import import_ppdet
from act_pipeline.importers.hugging_face.values import VIA_ONNX, int_list, require, shown

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
_RESNET_DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
_OUTPUTS = {"out_indices": [2, 3, 4], "out_features": ["stage2", "stage3", "stage4"]}


def backbone_section(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return PaddleDetection's module of the backbone, and its arguments.

    Args:
        config: content of ``config.json``.
        where: the file, for messages.

    Raises:
        UserError: the backbone is no ResNet-vd or PP-HGNetV2 of a known size.
    """
    section = config.get("backbone_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: key 'backbone_config' is {shown(section)}, expected an object")
    if config.get("backbone") is not None:
        raise UserError(
            f"{where}: key 'backbone' is {shown(config['backbone'])}, expected null and a backbone_config; {VIA_ONNX}"
        )
    where, kind = f"{where}: backbone_config", section.get("model_type", "rt_detr_resnet")
    for key, expected in _OUTPUTS.items():
        if section.get(key) is not None and section[key] != expected:
            raise UserError(f"{where}.{key} is {shown(section[key])}, expected {expected}; {VIA_ONNX}")
    trained = {"return_idx": [1, 2, 3], "freeze_at": -1, "freeze_norm": False}
    if kind == "rt_detr_resnet":
        require(section, _FIXED_RESNET, where)
        return "ResNet", {"depth": _resnet_depth(section, where), "variant": "d", "norm_decay": 0.0, **trained}
    if kind == "hgnet_v2":
        require(section, _FIXED_HGNET, where)
        return "PPHGNetV2", {"arch": _hgnet_architecture(section, where), "freeze_stem_only": False, **trained}
    raise UserError(
        f"{where}.model_type is {shown(kind)}, expected rt_detr_resnet or hgnet_v2 (ResNet-vd, PP-HGNetV2); {VIA_ONNX}"
    )


def _resnet_depth(section: Mapping[str, Any], where: str) -> int:
    kind, depths = section.get("layer_type", "bottleneck"), int_list(section, "depths", [3, 4, 6, 3], where)
    depth = _RESNET_DEPTHS.get((kind if isinstance(kind, str) else "", tuple(depths)))
    if depth is None:
        known = ", ".join(f"{layer} {list(blocks)}" for layer, blocks in _RESNET_DEPTHS)
        raise UserError(
            f"{where}: layer_type and depths are {shown(kind)} {depths}, expected one of {known}; {VIA_ONNX}"
        )
    widths = int_list(section, "hidden_sizes", _RESNET_WIDTHS["bottleneck"], where)
    if widths != _RESNET_WIDTHS[kind]:
        raise UserError(
            f"{where}: hidden_sizes are {widths}, expected {_RESNET_WIDTHS[kind]} of layer_type {kind}; {VIA_ONNX}"
        )
    return depth


def _hgnet_architecture(section: Mapping[str, Any], where: str) -> str:
    import_ppdet("ppdet.modeling")
    from act_pipeline.rtdetr.backbone import ARCHITECTURES

    found = {key: int_list(section, key, default, where) for key, default in _HGNET_DEFAULTS.items()}
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
