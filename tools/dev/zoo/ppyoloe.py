"""PP-YOLOE+ s of paddledet with random weights, exported as `tools/export_model.py` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.export import export_model
from act_pipeline.rtdetr.build import build_model


@dataclass(frozen=True)
class Sizes:
    """What distinguishes one PP-YOLOE+ from another.

    Attributes:
        classes: number of classes.
        depth_mult, width_mult: PaddleDetection's factors of the numbers of blocks and of channels.
        layers: blocks of each stage, before ``depth_mult``.
        neck_blocks: blocks of each level of the neck, before ``depth_mult``.
        nms: the parameters of ``MultiClassNMS`` that differ from :data:`_NMS`.
    """

    classes: int = 80
    depth_mult: float = 0.33
    width_mult: float = 0.50
    layers: tuple[int, int, int, int] = (3, 6, 6, 3)
    neck_blocks: int = 3
    nms: Mapping[str, Any] = field(default_factory=dict)


S = Sizes()
_NMS = {"nms_top_k": 1000, "keep_top_k": 300, "score_threshold": 0.01, "nms_threshold": 0.7}


def config(size: int, sizes: Sizes = S, architecture: str = "YOLOv3") -> dict[str, Any]:
    """Return PaddleDetection's config of a PP-YOLOE+.

    Args:
        size: height and width of the input.
        sizes: of the network; PP-YOLOE+ s by default.
        architecture: ``YOLOv3``, or ``PPYOLOEWithAuxHead``, which is trained with a second head.
    """
    steps = [
        {"Decode": {}},
        {"Resize": {"target_size": [size, size], "keep_ratio": False, "interp": 2}},
        {"NormalizeImage": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}},
        {"Permute": {}},
    ]
    parts = {"backbone": "CSPResNet", "neck": "CustomCSPPAN", "yolo_head": "PPYOLOEHead", "post_process": None}
    if architecture == "PPYOLOEWithAuxHead":
        parts["aux_head"] = "SimpleConvHead"
    return {
        "architecture": architecture, "norm_type": "sync_bn", "metric": "COCO", "num_classes": sizes.classes,
        "depth_mult": sizes.depth_mult, "width_mult": sizes.width_mult,
        architecture: parts,
        "CSPResNet": {
            "layers": list(sizes.layers), "channels": [64, 128, 256, 512, 1024], "return_idx": [1, 2, 3],
            "use_large_stem": True, "use_alpha": True,
        },
        "CustomCSPPAN": {
            "out_channels": [768, 384, 192], "stage_num": 1, "block_num": sizes.neck_blocks, "act": "swish",
            "spp": True,
        },
        "SimpleConvHead": {
            "feat_in": 192, "feat_out": 32, "num_convs": 1, "fpn_strides": [32, 16, 8], "norm_type": "gn",
            "act": "LeakyReLU", "reg_max": 16, "num_classes": sizes.classes,
        },
        "PPYOLOEHead": {
            "fpn_strides": [32, 16, 8], "grid_cell_scale": 5.0, "grid_cell_offset": 0.5, "static_assigner_epoch": 30,
            "use_varifocal_loss": True, "loss_weight": {"class": 1.0, "iou": 2.5, "dfl": 0.5},
            "static_assigner": {"name": "ATSSAssigner", "topk": 9},
            "assigner": {"name": "TaskAlignedAssigner", "topk": 13, "alpha": 1.0, "beta": 6.0},
            "nms": {"name": "MultiClassNMS", **_NMS, **sizes.nms},
        },
        "eval_size": [size, size],
        "TestReader": {"inputs_def": {"image_shape": [3, size, size]}, "sample_transforms": steps, "batch_size": 1},
    }  # fmt: skip


def write(folder: Path, pictures: np.ndarray, objects: int = 40, seed: int = 0) -> tuple[Path, Path]:
    """Write the config and random weights of it, and return both paths.

    Args:
        folder: the folder to write to.
        pictures: float32 [N, 3, S, S], 0 to 1: the normalizations get their statistics.
        objects: average number of places an image whose score is to be above 0.3, before NMS.
        seed: of the weights.
    """
    import paddle

    folder.mkdir(parents=True, exist_ok=True)
    content = config(pictures.shape[2])
    path, weights = folder / "ppyoloe_plus_crn_s.yml", folder / "model_final.pdparams"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    rng = np.random.default_rng(seed)
    model = build_model(str(path))
    for name, layer in model.named_sublayers():
        if "BatchNorm" in type(layer).__name__:
            layer.weight.set_value(rng.uniform(0.3, 0.6, layer.weight.shape).astype(np.float32))
            layer.bias.set_value(rng.normal(0.8, 0.3, layer.bias.shape).astype(np.float32))
        elif type(layer).__name__ == "Conv2D" and "proj_conv" not in name:  # that holds the distances
            fan = np.prod(layer.weight.shape[1:])
            spread = 0.3 if name.startswith("yolo_head.pred") else 1.0
            layer.weight.set_value((rng.normal(0, spread, layer.weight.shape) / np.sqrt(fan)).astype(np.float32))
    model.eval()
    # In training mode and without momentum, the statistics of the batch become those of the layer.
    for layer in model.sublayers():
        if "BatchNorm" in type(layer).__name__:
            layer.training, layer._momentum = True, 0.0
    size = float(pictures.shape[2])
    batch = {
        "image": paddle.to_tensor(pictures),
        "im_shape": paddle.full([len(pictures), 2], size),
        "scale_factor": paddle.ones([len(pictures), 2]),
    }
    with paddle.no_grad():
        model(batch)
        for layer in model.sublayers():
            if "BatchNorm" in type(layer).__name__:
                layer.training = False
        features = model.neck(model.backbone(batch), False)
        scores = model.yolo_head(features)[0].numpy()  # [N, C, A], after the sigmoid
    best = np.sort(np.log(scores.max(1) / (1 - scores.max(1))).reshape(-1))
    shift = float(np.log(0.3 / 0.7) - best[-objects * len(pictures)])
    for layer in model.yolo_head.pred_cls:
        layer.bias.set_value(layer.bias + shift)
    paddle.save(model.state_dict(), str(weights))
    return path, weights


def export(folder: Path, made: tuple[Path, Path], overrides: Sequence[str] = ()) -> InferenceModel:
    """Return the exported model.

    Args:
        folder: its parent.
        made: config and weights, see :func:`write`.
        overrides: ``key=value`` of the config.
    """
    return export_model(made[0], folder, [f"weights={made[1]}", *overrides])
