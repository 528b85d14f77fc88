"""Conversion of Hugging Face's RT-DETR weights (``RTDetrForObjectDetection``) to PaddleDetection's names.

The two models compute the same function. They differ in names, in the layout of linear weights ([out, in] in
``transformers``, [in, out] here), and in the attention's q, k and v (three matrices in ``transformers``, one
``in_proj`` here). Only NumPy is needed.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping

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
# The decoder's heads are listed a second time at the top level.
_SUPERFLUOUS = re.compile(r"num_batches_tracked$|^(?:class_embed|bbox_embed)\.")
_ATTENTION = re.compile(r"^(.*\.self_attn)\.([qkv])_proj\.(weight|bias)$")


def convert_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert a PP-HGNetV2 RT-DETR state dict of ``transformers`` to PaddleDetection's names, layouts and shapes.

    Args:
        state: the model's state dict as NumPy arrays, under ``transformers``' names.

    Returns:
        float32 arrays under PaddleDetection's names; the padding row of ``transformers``' denoising embedding is
        dropped.

    Raises:
        UserError: a name is unknown.
    """
    converted: dict[str, np.ndarray] = {}
    attention: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state.items():
        if _SUPERFLUOUS.search(name):
            continue
        new = _paddle_name(name)
        array = _paddle_layout(new, np.asarray(value, np.float32), state)
        part = _ATTENTION.match(new)
        if part:
            owner, letter, kind = part.groups()
            attention.setdefault(f"{owner}.in_proj_{kind}", {})[letter] = array
        else:
            converted[new] = np.array(array, np.float32, order="C")
    for name, parts in attention.items():
        converted[name] = np.concatenate([parts["q"], parts["k"], parts["v"]], axis=-1)
    return converted


def _paddle_name(name: str) -> str:
    new = name
    for pattern, replacement in _RULES:
        new = re.sub(pattern, replacement, new)
    if not new.startswith(("backbone.", "neck.", "transformer.")):
        raise UserError(
            f"weights: {name} is no name of an RT-DETR with PP-HGNetV2 in transformers; "
            "expected a state dict of RTDetrForObjectDetection"
        )
    return new


def _paddle_layout(name: str, array: np.ndarray, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return linear weights as [in, out], and the denoising embedding without its padding row."""
    if name == "transformer.denoising_class_embed.weight":
        return array[: state["model.enc_score_head.bias"].shape[0]]
    return array.T if array.ndim == 2 else array


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
