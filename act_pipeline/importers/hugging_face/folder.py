"""From a model folder of Hugging Face's ``transformers`` (RT-DETR, RT-DETRv2) to an `InferenceModel`.

The weights get PaddleDetection's names, and the model is exported as one of PaddleDetection is. Neither PyTorch nor
``transformers`` is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.export import plan_export
from act_pipeline.importers.hugging_face.model_config import check_lengths, class_names, model_content, offset_scale
from act_pipeline.importers.hugging_face.preprocessor import input_section
from act_pipeline.importers.hugging_face.safetensors_file import read_safetensors
from act_pipeline.importers.hugging_face.values import read_json
from act_pipeline.rtdetr.hf_weights import convert_state_dict, count_resnet_blocks, paddle_name

CONFIG_FILENAME = "config.json"
WEIGHTS_FILENAME = "model.safetensors"
_SHARDS_FILENAME = "model.safetensors.index.json"
_PREPROCESSOR_FILENAME = "preprocessor_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_SCORES = "model.enc_score_head.bias"
_OFFSETS = re.compile(r"\.cross_attn\.sampling_offsets\.(weight|bias)$")
_MAX_NAMED = 3


def import_hugging_face(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    input_size: Sequence[int] | None = None,
    flag: str = "--output_dir",
) -> InferenceModel:
    """Import an RT-DETR or RT-DETRv2 of ``transformers``.

    Pictures are resized by OpenCV with the interpolation of ``preprocessor_config.json``, as all of this project's
    models have it; ``transformers`` also smooths when it makes a picture smaller, so scores differ a little there.

    Args:
        folder: has ``config.json``, ``model.safetensors`` and, unless the defaults of ``transformers`` apply (640 x
            640, pixels / 255), ``preprocessor_config.json``. Backbones: ResNet-vd and PP-HGNetV2.
        output: the folder to write, with ``model.pdmodel``, ``model.pdiparams``, ``infer_cfg.yml`` and ``export.json``.
        input_size: height and width of the input in pixels, multiples of 32; None takes the preprocessor's.
        flag: the command's flag that names ``output``, for messages.

    Returns:
        the model, with the inputs and outputs of :func:`act_pipeline.export.export_model`.

    Raises:
        UserError: a file is missing or not as it must be, the model is another one or computes what PaddleDetection's
            RT-DETR does not, or config and weights do not fit each other.
    """
    source = Path(folder)
    weights_path = _weights_path(source)
    where = str(source / CONFIG_FILENAME)
    config = read_json(source / CONFIG_FILENAME)
    preprocessor = source / _PREPROCESSOR_FILENAME
    model_content(config, where, 1)  # a model of another type is told from its config, not from its weights
    tensors = read_safetensors(weights_path)
    scores = tensors.get(_SCORES)
    if scores is None or scores.ndim != 1:
        raise UserError(
            f"{weights_path}: {_SCORES} is {'missing' if scores is None else list(scores.shape)}, expected the scores' "
            "biases of RTDetrForObjectDetection or RTDetrV2ForObjectDetection; save the whole model, with its heads"
        )
    num_classes = len(scores)
    check_lengths(config, where, tensors, str(weights_path))
    names = class_names(config, where, num_classes)
    content = model_content(config, where, num_classes)
    content["TestReader"] = input_section(
        read_json(preprocessor) if preprocessor.exists() else {},
        str(preprocessor),
        config.get("anchor_image_size"),
        input_size,
    )
    plan = plan_export(where, content, label_list=names)
    try:
        state = convert_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{weights_path}: {error}") from None
    scale = offset_scale(config, where)
    for name in filter(_OFFSETS.search, state):
        state[name] = state[name] * np.float32(scale)

    def load(model: Any) -> None:
        _check_fit(weights_path, where, model.state_dict(), state, tensors)
        from act_pipeline.rtdetr.build import set_weights

        set_weights(model, state, str(weights_path))

    files = [path for path in (source / CONFIG_FILENAME, preprocessor, weights_path) if path.exists()]
    record = {"config": where, "overrides": [], "importer": "hugging_face", "source_hash": hash_files(files)}
    return plan.export(load, Path(output), record, flag)


def _weights_path(folder: Path) -> Path:
    """Return the folder's ``model.safetensors``.

    Raises:
        UserError: the folder is none of a model, or its weights are in another form.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder, expected one with {CONFIG_FILENAME} and {WEIGHTS_FILENAME}, as "
            "model.save_pretrained(FOLDER) writes it"
        )
    path = folder / WEIGHTS_FILENAME
    if path.is_file():
        return path
    if (folder / _SHARDS_FILENAME).exists():
        raise UserError(
            f"{folder} has {_SHARDS_FILENAME}: the weights lie in several files, expected one {WEIGHTS_FILENAME}; save "
            'the model again with model.save_pretrained(FOLDER, max_shard_size="10GB")'
        )
    pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read, expected {WEIGHTS_FILENAME}; if "
            "you trust it, convert it: AutoModelForObjectDetection.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise UserError(f"{folder} has no {WEIGHTS_FILENAME}; copy the whole folder that model.save_pretrained wrote")


def _check_fit(
    path: Path,
    where: str,
    expected: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Compare the weights with the model that the config describes, in the names of ``transformers``.

    Args:
        path: file of the weights.
        where: file of the config.
        expected: PaddleDetection's name -> parameter.
        state: PaddleDetection's name -> array.
        tensors: name in ``transformers`` -> array.

    Raises:
        UserError: a tensor is missing, has another shape, or is not in the model.
    """
    blocks = count_resnet_blocks(tensors)
    originals: dict[str, str] = {}
    for name in tensors:
        new = re.sub(r"\.[qkv]_proj\.(weight|bias)$", r".in_proj_\1", paddle_name(name, blocks) or "")
        originals.setdefault(new, name)
    faults = [
        f"{originals.get(name, name)} has {list(state[name].shape)} in the layout of {name}, expected "
        f"{list(parameter.shape)}"
        for name, parameter in expected.items()
        if name in state and list(state[name].shape) != list(parameter.shape)
    ]
    faults += [f"there is nothing for {name} (PaddleDetection's name)" for name in expected if name not in state]
    faults += [f"{originals.get(name, name)} is not in the model" for name in state if name not in expected]
    if faults:
        more = f"; and {len(faults) - _MAX_NAMED} more" if len(faults) > _MAX_NAMED else ""
        raise UserError(
            f"{path} does not fit {where}: {'; '.join(faults[:_MAX_NAMED])}{more}; copy both files of one training"
        )
