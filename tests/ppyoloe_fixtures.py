"""Tiny PP-YOLOEs with random weights, in the form of PaddleDetection's configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel

SIZE = 64
CLASSES = 3
_NMS = {
    "name": "MultiClassNMS", "nms_top_k": 40, "keep_top_k": 25, "score_threshold": 0.2, "nms_threshold": 0.6,
}  # fmt: skip
_STEPS = [
    {"Decode": {}},
    {"Resize": {"target_size": [SIZE, SIZE], "keep_ratio": False, "interp": 2}},
    {"NormalizeImage": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}},
    {"Permute": {}},
]


def ppyoloe_config(architecture: str = "YOLOv3") -> dict:
    """Return the content of a PP-YOLOE+ config with few channels, in the order of PaddleDetection's."""
    parts = {"backbone": "CSPResNet", "neck": "CustomCSPPAN", "yolo_head": "PPYOLOEHead", "post_process": None}
    if architecture == "PPYOLOEWithAuxHead":
        parts["aux_head"] = "SimpleConvHead"
    return {
        "architecture": architecture, "norm_type": "sync_bn", "metric": "COCO", "num_classes": CLASSES,
        "depth_mult": 1.0, "width_mult": 0.125,
        architecture: parts,
        "CSPResNet": {
            "layers": [1, 1, 1, 1], "channels": [64, 128, 256, 512, 1024], "return_idx": [1, 2, 3],
            "use_large_stem": True, "use_alpha": True,
        },
        "CustomCSPPAN": {
            "out_channels": [768, 384, 192], "stage_num": 1, "block_num": 1, "act": "swish", "spp": True,
        },
        "SimpleConvHead": {
            "feat_in": 192, "feat_out": 32, "num_convs": 1, "fpn_strides": [32, 16, 8], "norm_type": "gn",
            "act": "LeakyReLU", "reg_max": 16, "num_classes": CLASSES,
        },
        "PPYOLOEHead": {
            "fpn_strides": [32, 16, 8], "grid_cell_scale": 5.0, "grid_cell_offset": 0.5, "static_assigner_epoch": 30,
            "use_varifocal_loss": True, "loss_weight": {"class": 1.0, "iou": 2.5, "dfl": 0.5},
            "static_assigner": {"name": "ATSSAssigner", "topk": 9},
            "assigner": {"name": "TaskAlignedAssigner", "topk": 13, "alpha": 1.0, "beta": 6.0},
            "nms": dict(_NMS),
        },
        "eval_size": [SIZE, SIZE],
        "TestReader": {"inputs_def": {"image_shape": [3, SIZE, SIZE]}, "sample_transforms": _STEPS, "batch_size": 1},
    }  # fmt: skip


def write_model(folder: Path, content: dict, seed: int = 0) -> tuple[Path, Path]:
    """Write a config and random weights of it, with scores on both sides of the threshold; return both paths."""
    import paddle

    from act_pipeline.rtdetr.build import build_model

    folder.mkdir(parents=True, exist_ok=True)
    config, weights = folder / "model.yml", folder / "model_final.pdparams"
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    paddle.seed(seed)
    rng = np.random.default_rng(seed)
    state = build_model(str(config)).state_dict()
    for name, value in state.items():
        shape = value.shape
        if name.startswith("yolo_head.pred_cls"):
            scale, middle = (0.05, 0.0) if name.endswith("weight") else (0.5, -1.0)
            state[name] = paddle.to_tensor(rng.normal(middle, scale, shape).astype("float32"))
        elif name.startswith("yolo_head.pred_reg"):
            state[name] = paddle.to_tensor(rng.normal(0, 0.05, shape).astype("float32"))
    paddle.save(state, str(weights))
    return config, weights


def exported(folder: Path, content: dict, *overrides: str) -> InferenceModel:
    """Write and export a model with random weights."""
    from act_pipeline.export import export_model

    config, weights = write_model(folder, content)
    return export_model(config, folder / "exported", [f"weights={weights}", *overrides])


def pictures(count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Return a batch of random pictures whose originals were larger than the input."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 3, 8, 8))
    return {
        "image": np.kron(coarse, np.ones((1, 1, SIZE // 8, SIZE // 8))).astype(np.float32),
        "im_shape": np.full((count, 2), SIZE, np.float32),
        "scale_factor": np.tile(np.array([[0.5, 0.4]], np.float32), (count, 1)),
    }
