"""Write RT-DETRv2 or D-FINE of transformers, with random weights, as ONNX, in a Python that has torch.

    PYTHON in_torch.py rtdetrv2 pictures.npy model.onnx [folder]

``pictures.npy`` holds float32 [N, 3, S, S] from 0 to 1; ``folder`` gets the model as ``save_pretrained`` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DFineConfig, DFineForObjectDetection, RTDetrV2Config, RTDetrV2ForObjectDetection

_CLASSES = 80
_RESNET18 = {
    "model_type": "rt_detr_resnet", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_HGNET_N = {
    "model_type": "hgnet_v2", "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128], "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1], "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3], "use_learnable_affine_block": True,
    "out_features": ["stage2", "stage3", "stage4"], "hidden_sizes": [64, 256, 512, 1024], "embedding_size": 16,
}  # fmt: skip
_LABELS = {index: f"class_{index}" for index in range(_CLASSES)}


def rtdetrv2() -> nn.Module:
    """Return RT-DETRv2-R18: ResNet-18 vd, 3 decoder layers, 300 queries."""
    config = RTDetrV2Config(
        backbone_config=_RESNET18, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3,
        id2label=_LABELS, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    return RTDetrV2ForObjectDetection(config)


def dfine() -> nn.Module:
    """Return D-FINE-S: HGNetV2-B0, 3 decoder layers, 300 queries."""
    config = DFineConfig(
        backbone_config=_HGNET_N, encoder_in_channels=[256, 512, 1024], hidden_expansion=0.5, depth_mult=0.34,
        decoder_layers=3, decoder_in_channels=[256, 256, 256], id2label=_LABELS, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    return DFineForObjectDetection(config)


def calibrate(model: nn.Module, pictures: torch.Tensor) -> None:
    """Give every normalization the statistics of pictures, and bias the classes so that some queries detect something.

    The means after normalization are where activations are nearly linear, see network.py.
    """
    generator = torch.Generator().manual_seed(0)

    def measure(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        layer.running_mean.copy_(x.mean((0, 2, 3)))
        layer.running_var.copy_(x.var((0, 2, 3), unbiased=False) + 1e-3)

    hooks = []
    for layer in model.modules():
        if getattr(layer, "running_mean", None) is not None:
            size = layer.weight.shape
            layer.weight.data.copy_(torch.rand(size, generator=generator) * 0.3 + 0.3)
            layer.bias.data.copy_(torch.randn(size, generator=generator) * 0.3 + 0.6)
            hooks.append(layer.register_forward_pre_hook(measure))
        elif isinstance(layer, nn.Conv2d):
            fan = layer.weight[0].numel()
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) / fan**0.5)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ("class_embed" in name or "enc_score_head" in name):
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
            layer.bias.data.fill_(-4.0)
        elif isinstance(layer, nn.Linear) and layer.weight.abs().max() == 0:  # the last one of a box head
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.01)
    model(pictures)
    for hook in hooks:
        hook.remove()
    best = torch.cat([model(picture[None]).logits.max(-1).values.flatten() for picture in pictures])
    # 12 of 300 queries of a picture above a score of 0.3.
    shift = float(np.log(0.3 / 0.7) - torch.quantile(best, 1 - 12 / 300))
    # Modules share these parameters: each is shifted once.
    for name, parameter in model.named_parameters():
        if "class_embed" in name and name.endswith("bias"):
            parameter.data += shift


class Outputs(nn.Module):
    """A detector with logits and boxes as its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(images)
        return found.logits, found.pred_boxes


def export(model: nn.Module, picture: torch.Tensor, path: str) -> None:
    """Write the ONNX file, by PyTorch's tracing exporter."""
    try:
        import onnx  # noqa: F401
    except ImportError:  # needed for functions of onnxscript only, of which there are none
        from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

        onnx_proto_utils._add_onnxscript_fn = lambda model_bytes, custom_opsets: model_bytes
    torch.onnx.export(
        Outputs(model), (picture,), path, dynamo=False, opset_version=17, input_names=["images"],
        output_names=["logits", "pred_boxes"], do_constant_folding=True,
    )  # fmt: skip


def main() -> None:
    kind, pictures, path, *folder = sys.argv[1:]
    torch.manual_seed(0)
    model = {"rtdetrv2": rtdetrv2, "d-fine": dfine}[kind]().eval()
    images = torch.from_numpy(np.load(pictures))
    with torch.no_grad():
        calibrate(model, images)
        export(model, images[:1], path)
    for each in folder:
        model.save_pretrained(each)
        height, width = images.shape[2:]
        preprocessor = {
            "do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True, "resample": 3,
            "size": {"height": height, "width": width},
        }  # fmt: skip
        Path(each, "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")


if __name__ == "__main__":
    main()
