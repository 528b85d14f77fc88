"""From a checkpoint of lyuwenyu/RT-DETR (PyTorch) and a PaddleDetection config to an `InferenceModel`.

Both repositories are of RT-DETR's authors, and the modules are the same; names and the layout of linear weights differ.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.yaml_files import apply_overrides, load_yaml
from act_pipeline.export import COCO_CLASSES, plan_export
from act_pipeline.importers.torch_file import StoredTensor, TorchFile
from act_pipeline.rtdetr.hf_weights import (
    add_denoising_embedding,
    count_blocks,
    resnet_block_name,
    to_paddle_layout,
)

_logger = logging.getLogger(__name__)
_RESNET_BLOCK = re.compile(r"^backbone\.res_layers\.(\d{1,3})\.blocks\.(\d{1,3})\.")
_POINTS_SCALE = re.compile(r"\.num_points_scale$")
# Constants that PyTorch saves with the weights.
_BUFFERS = re.compile(r"(\.num_batches_tracked|\.num_points_scale|\.anchors|\.valid_mask|\.pos_embed\d+)$")
_RULES = (
    (r"^(backbone\.(?:stem|stages)\..*)\.conv\.1\.", r"\1.conv."),  # after a layer that pads
    (r"^encoder\.", "neck."),
    (r"^(neck\.input_proj\.\d+)\.conv\.", r"\1.0."),
    (r"^(neck\.input_proj\.\d+)\.norm\.", r"\1.1."),
    (r"^(neck\.(?:lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\..*)\.norm\.", r"\1.bn."),
    (r"^decoder\.", "transformer."),
    (r"^transformer\.enc_output\.proj\.", "transformer.enc_output.0."),
    (r"^transformer\.enc_output\.norm\.", "transformer.enc_output.1."),
    (r"\.running_mean$", "._mean"),
    (r"\.running_var$", "._variance"),
)
_DENOISING = "transformer.denoising_class_embed.weight"
_SCORES = "transformer.enc_score_head.bias"
_MAX_NAMED = 3


def import_torch_checkpoint(
    checkpoint: str | os.PathLike[str],
    config: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    flag: str = "--output_dir",
) -> InferenceModel:
    """Import weights that lyuwenyu/RT-DETR trained: the averaged ones (EMA) where the checkpoint has them.

    The sampling of RT-DETRv2's decoder must be its default one: ``cross_attn_method: discrete`` leaves no trace in the
    weights.

    Args:
        checkpoint: the ``.pth``, with ``{"ema": {"module": ...}}``, ``{"model": ...}`` or the weights alone.
        config: PaddleDetection's YAML of the same model, such as ``configs/rtdetr/rtdetr_r18vd_6x_coco.yml``.
        output: the folder to write, with ``model.pdmodel``, ``model.pdiparams``, ``infer_cfg.yml`` and ``export.json``.
        overrides: ``key=value`` each, for the config: ``num_classes=3``, ``RTDETRTransformer.num_decoder_points=1``.
        flag: the command's flag that names ``output``, for messages.

    Returns:
        the model, with the inputs and outputs of :func:`act_pipeline.export.export_model`.

    Raises:
        UserError: a file is missing or not as it must be, or the weights do not fit the config.
    """
    source = find_shipped(config)
    content = apply_overrides(load_yaml(source), overrides)
    if "PResNet" in str(content.get("RTDETR", "")) or "__include__" in content:
        raise UserError(
            f"{source} is a config of lyuwenyu/RT-DETR, expected PaddleDetection's of the same model, such as "
            "configs/rtdetr/rtdetr_r18vd_6x_coco.yml"
        )
    plan = plan_export(str(source), {"trt": True, **content}, overrides)
    with TorchFile(checkpoint) as file:
        tensors = _weights_of(file)
        _check_points(file, tensors)
        named = _rename(file, tensors)

        def load(model: Any) -> None:
            state = _read(file, named, model.state_dict(), str(source), int(content.get("num_classes", COCO_CLASSES)))
            from act_pipeline.rtdetr.build import set_weights

            set_weights(model, state, str(checkpoint))

        record = {
            "config": str(source),
            "overrides": list(overrides),
            "importer": "torch",
            "source_hash": hash_files([checkpoint]),
        }
        return plan.export(load, Path(output), record, flag)


def _weights_of(file: TorchFile) -> dict[str, StoredTensor]:
    """Return the checkpoint's state dict: ``ema`` before ``model``, as lyuwenyu/RT-DETR exports it."""
    content = file.content
    candidates = []
    if isinstance(content, dict):
        ema = content.get("ema")
        candidates = [ema.get("module") if isinstance(ema, dict) else None, ema, content.get("model"), content]
    for candidate in candidates:
        if isinstance(candidate, dict):
            tensors = {name: value for name, value in candidate.items() if isinstance(value, StoredTensor)}
            if tensors and all(isinstance(name, str) for name in tensors):
                return {name[7:] if name.startswith("module.") else name: value for name, value in tensors.items()}
    keys = (
        ", ".join(str(key)[:40] for key in list(content)[:5]) if isinstance(content, dict) else type(content).__name__
    )
    raise UserError(
        f"{file.path} holds {keys or 'nothing'}, expected the weights of lyuwenyu/RT-DETR under 'ema' or 'model'"
    )


def _check_points(file: TorchFile, tensors: Mapping[str, StoredTensor]) -> None:
    """Check the points of RT-DETRv2's sampling: as many on each level."""
    scales = [name for name in tensors if _POINTS_SCALE.search(name)]
    if not scales:
        return
    for name in scales:
        values = file.read(tensors[name])
        if values.size == 0 or not np.allclose(values, values.flat[0]):
            raise UserError(
                f"{file.path}: {name} says that the levels have different numbers of points, expected one number for "
                "all (num_points); export the model to ONNX, and import that with --onnx"
            )
    _logger.warning(
        "%s is of RT-DETRv2: it is imported as trained with cross_attn_method and query_select_method 'default'; if it "
        "was 'discrete' (the published *_dsp_* models), export it to ONNX, and import that with --onnx",
        file.path,
    )


def _rename(file: TorchFile, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, StoredTensor]]:
    """Return PaddleDetection's name -> name in the checkpoint and tensor."""
    blocks = count_blocks(tensors, _RESNET_BLOCK)
    named: dict[str, tuple[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if _BUFFERS.search(name):
            continue
        block = _RESNET_BLOCK.match(name)
        new = name
        if block:
            owner = resnet_block_name(int(block[1]), int(block[2]), blocks[int(block[1])])
            new = f"{owner}.{name[block.end() :]}"
        for pattern, replacement in _RULES:
            new = re.sub(pattern, replacement, new)
        if new in named:
            raise UserError(f"{file.path}: {name} and {named[new][0]} are one weight ({new}), expected it once")
        named[new] = (name, tensor)
    return named


def _read(
    file: TorchFile,
    named: Mapping[str, tuple[str, StoredTensor]],
    expected: Mapping[str, Any],
    source: str,
    classes: int,
) -> dict[str, np.ndarray]:
    """Read the weights after comparing their shapes with the model's.

    Args:
        file: the checkpoint.
        named: PaddleDetection's name -> name in the checkpoint and tensor.
        expected: PaddleDetection's name -> parameter.
        source: the config, for messages.
        classes: its number of classes.

    Returns:
        PaddleDetection's name -> float32 array.

    Raises:
        UserError: a weight is missing, has another shape, or is not in the model.
    """
    scores = named.get(_SCORES)
    if scores is not None and scores[1].shape != (classes,):
        raise UserError(
            f"{file.path} has {list(scores[1].shape)} classes, {source} has num_classes {classes}; set num_classes "
            "to that of the training"
        )
    faults = []
    for name, parameter in expected.items():
        if name not in named:
            faults += [] if name == _DENOISING else [f"there is nothing for {name} (PaddleDetection's name)"]
            continue
        original, tensor = named[name]
        wanted = tuple(to_paddle_layout(name, np.empty(parameter.shape, "?"), classes).shape)
        found = tensor.shape
        if name == _DENOISING and len(found) == 2 and found[0] > wanted[0]:
            found = (wanted[0], found[1])  # PyTorch's has a row more, for padding
        if found != wanted:
            faults.append(f"{original} is {list(tensor.shape)}, expected {list(wanted)}")
    faults += [f"{original} is not in the model" for name, (original, _) in named.items() if name not in expected]
    if faults:
        more = f"; and {len(faults) - _MAX_NAMED} more" if len(faults) > _MAX_NAMED else ""
        raise UserError(
            f"{file.path} does not fit {source}: {'; '.join(faults[:_MAX_NAMED])}{more}; give the config of the same "
            "backbone and size, or set its keys"
        )
    state = {name: to_paddle_layout(name, file.read(tensor), classes) for name, (_, tensor) in named.items()}
    add_denoising_embedding(state)
    return {name: np.ascontiguousarray(array) for name, array in state.items()}
