"""Conversion of Hugging Face's RT-DETR weights (``RTDetrForObjectDetection``) to PaddleDetection's names.

The two models compute the same function. They differ in names, in the layout of linear weights ([out, in] in
``transformers``, [in, out] here), and in the attention's q, k and v (three matrices in ``transformers``, one
``in_proj`` here). Backbones: PP-HGNetV2 and ResNet-vd. Only NumPy is needed.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping

import numpy as np

from act_pipeline.core.atomic_files import open_atomically
from act_pipeline.core.errors import UserError

_RULES = (
    (r"^model\.backbone\.model\.embedder\.", "backbone.stem."),
    (r"^model\.backbone\.model\.encoder\.stages\.", "backbone.stages."),
    (r"^(backbone\..*)\.aggregation\.0\.", r"\1.aggregation_squeeze_conv."),
    (r"^(backbone\..*)\.aggregation\.1\.", r"\1.aggregation_excitation_conv."),
    (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\..*)\.normalization\.", r"\1.bn."),
    (r"^model\.encoder_input_proj\.", "neck.input_proj."),
    (r"^model\.encoder\.(?:aifi|encoder)\.(\d+)\.layers\.(\d+)\.", r"neck.encoder.\1.layers.\2."),
    (r"^(neck\.encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(neck\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^model\.encoder\.(lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\.", r"neck.\1."),
    (r"^(neck\.(?:lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\..*)\.norm\.", r"\1.bn."),
    (r"^model\.decoder_input_proj\.(\d+)\.0\.", r"transformer.input_proj.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d+)\.1\.", r"transformer.input_proj.\1.norm."),
    (r"^model\.decoder\.query_pos_head\.", "transformer.query_pos_head."),
    (r"^model\.decoder\.class_embed\.", "transformer.dec_score_head."),
    (r"^model\.decoder\.bbox_embed\.", "transformer.dec_bbox_head."),
    (r"^model\.decoder\.layers\.", "transformer.decoder.layers."),
    (r"^(transformer\.decoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(transformer\.decoder\..*)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"^(transformer\.decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    (r"^(transformer\.decoder\..*)\.encoder_attn\.", r"\1.cross_attn."),
    (r"^model\.(enc_output|enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"transformer.\1."),
    (r"\.self_attn\.o(?:ut)?_proj\.", ".self_attn.out_proj."),
    (r"\.(?:mlp\.)?fc1\.", ".linear1."),
    (r"\.(?:mlp\.)?fc2\.", ".linear2."),
    (r"\.running_mean$", "._mean"),
    (r"\.running_var$", "._variance"),
)

_ATTENTION = re.compile(r"^(.*\.self_attn)\.([qkv])_proj\.(weight|bias)$")
_TIED_HEADS = re.compile(r"^(class_embed|bbox_embed)\.")
_RESNET_STEM = re.compile(r"^model\.backbone\.model\.embedder\.embedder\.(\d{1,3})\.")
_RESNET_BLOCK = re.compile(
    r"^model\.backbone\.model\.encoder\.stages\.(\d{1,3})\.layers\.(\d{1,3})\.(?:layer\.(\d{1,3})|shortcut(\.1)?)\."
)
# RT-DETRv2's constant 1 / points, and the buffers of fixed anchors.
_BUFFERS = re.compile(r"(\.num_batches_tracked|\.n_points_scale|^model\.(anchors|valid_mask))$")
# Tables of vectors, which are no matrices of a linear layer.
_EMBEDDINGS = ("transformer.denoising_class_embed.weight", "transformer.tgt_embed.weight")
_DENOISING = _EMBEDDINGS[0]


def resnet_block_name(stage: int, block: int, blocks: int) -> str:
    """Return PaddleDetection's name of a block of ResNet, ``backbone.res4.res4b``.

    Args:
        stage: index of the stage, from 0 (``res2``).
        block: index of the block in it, from 0.
        blocks: number of blocks of the stage; in ``res4`` of ResNet-101 and deeper, numbers replace letters.
    """
    owner = f"res{stage + 2}"
    if stage == 2 and blocks > 10:
        return f"backbone.{owner}.{owner}{f'b{block}' if block else 'a'}"
    return f"backbone.{owner}.{owner}{chr(ord('a') + block)}"


def count_blocks(names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, int]:
    """Return the number of blocks of each stage; groups 1 and 2 of ``pattern`` are indices of a stage and a block."""
    counts: dict[int, int] = {}
    for match in filter(None, map(pattern.match, names)):
        stage, block = int(match[1]), int(match[2])
        counts[stage] = max(counts.get(stage, 0), block + 1)
    return counts


def to_paddle_layout(name: str, array: np.ndarray, num_classes: int) -> np.ndarray:
    """Convert an array of PyTorch to the layout of PaddleDetection's parameter of that name.

    Args:
        name: PaddleDetection's name.
        array: [out, in] for a linear layer; other layouts are the same in both.
        num_classes: the row after these is the padding of PyTorch's denoising embedding, and is dropped.

    Returns:
        a view of ``array``.
    """
    if name == _DENOISING:
        return array[:num_classes]
    return array.T if array.ndim == 2 and name not in _EMBEDDINGS else array


def add_denoising_embedding(weights: dict[str, np.ndarray]) -> None:
    """Add zeros for the embedding of denoising queries if it is missing: a model without them was trained so."""
    bias = weights.get("transformer.enc_score_head.bias")
    head = weights.get("transformer.enc_score_head.weight")
    if _DENOISING not in weights and bias is not None and head is not None and bias.ndim == 1 and head.ndim == 2:
        weights[_DENOISING] = np.zeros((len(bias), head.shape[0]), np.float32)


def paddle_name(name: str, blocks: Mapping[int, int]) -> str | None:
    """Return PaddleDetection's name of a tensor of ``transformers``, with q, k and v still apart.

    Args:
        name: the name in ``transformers``, 4 or 5.
        blocks: number of blocks of each ResNet stage, of :func:`count_resnet_blocks`.

    Returns:
        the name; None for a buffer that PaddleDetection does not have.

    Raises:
        UserError: it is no name of an RT-DETR.
    """
    if _BUFFERS.search(name):
        return None
    new = _TIED_HEADS.sub(r"model.decoder.\1.", name)  # the same tensors, under the name of the decoder's heads
    new = _RESNET_STEM.sub(lambda match: f"backbone.conv1.conv1_{int(match[1]) + 1}.", new)
    block = _RESNET_BLOCK.match(new)
    if block:
        owner = resnet_block_name(int(block[1]), int(block[2]), blocks.get(int(block[1]), 0))
        branch = f"branch2{chr(ord('a') + int(block[3]))}" if block[3] else f"short{'.conv' if block[4] else ''}"
        new = f"{owner}.{branch}.{new[block.end() :]}"
    if new != name and new.startswith("backbone."):
        new = new.replace(".normalization.", ".norm.")
    for pattern, replacement in _RULES:
        new = re.sub(pattern, replacement, new)
    if not new.startswith(("backbone.", "neck.", "transformer.")):
        raise UserError(
            f"weights: {name} is no name of an RT-DETR in transformers; expected a state dict of "
            "RTDetrForObjectDetection or RTDetrV2ForObjectDetection"
        )
    return new


def count_resnet_blocks(names: Iterable[str]) -> dict[int, int]:
    """Return the number of blocks of each ResNet stage in a state dict of ``transformers``; empty without ResNet."""
    return count_blocks(names, _RESNET_BLOCK)


def convert_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert an RT-DETR state dict of ``transformers`` to PaddleDetection's names, layouts and shapes.

    Args:
        state: the model's state dict as NumPy arrays, under ``transformers``' names; RT-DETR or RT-DETRv2 with
            PP-HGNetV2 or ResNet-vd.

    Returns:
        float32 arrays under PaddleDetection's names; the padding row of ``transformers``' denoising embedding is
        dropped.

    Raises:
        UserError: a name is unknown, or one of q, k and v is missing.
    """
    blocks = count_resnet_blocks(state)
    bias = state.get("model.enc_score_head.bias")
    if bias is None or bias.ndim != 1:
        raise UserError(
            "weights: model.enc_score_head.bias is missing or no vector; expected a state dict of "
            "RTDetrForObjectDetection or RTDetrV2ForObjectDetection"
        )
    converted: dict[str, np.ndarray] = {}
    attention: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state.items():
        new = paddle_name(name, blocks)
        if new is None or (_TIED_HEADS.match(name) and f"model.decoder.{name}" in state):
            continue
        array = to_paddle_layout(new, np.asarray(value, np.float32), len(bias))
        part = _ATTENTION.match(new)
        if part:
            owner, letter, kind = part.groups()
            attention.setdefault(f"{owner}.in_proj_{kind}", {})[letter] = array
        elif new in converted:
            raise UserError(f"weights: {name} is there a second time under another name ({new}), expected once")
        else:
            converted[new] = np.array(array, np.float32, order="C")
    for name, parts in attention.items():
        shapes = {array.shape for array in parts.values()}
        if len(parts) < 3 or len(shapes) > 1:
            raise UserError(
                f"weights: {name} has {', '.join(sorted(parts))} of shapes {sorted(shapes)}, expected q, k and v of "
                "one shape"
            )
        converted[name] = np.concatenate([parts["q"], parts["k"], parts["v"]], axis=-1)
    add_denoising_embedding(converted)
    return converted


def save_pdparams(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Write weights in the format of ``paddle.save``, atomically and without PaddlePaddle.

    Args:
        path: the file; its folder is created if missing.
        weights: name -> array.

    Raises:
        UserError: NumPy is 2 or later, whose pickles NumPy 1 (required by PaddlePaddle 2.6) cannot read.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise UserError(
            f"NumPy is {np.__version__}, expected 1.x to write weights that PaddlePaddle 2.6 can read: "
            "pip install 'numpy<2' and run again with --resume"
        )
    with open_atomically(path) as file:
        pickle.dump({key: np.ascontiguousarray(value) for key, value in weights.items()}, file, protocol=4)
