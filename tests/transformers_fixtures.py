"""RT-DETR weights under the names of transformers and of lyuwenyu/RT-DETR, written without either: for imports."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 64
LABELS = {"0": "RBC", "1": "WBC", "2": "Platelets"}
# A small RT-DETR: the backbone is R18's, all else is as narrow as it gets.
SMALL = {
    "model_type": "rt_detr",
    "architectures": ["RTDetrForObjectDetection"],
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
        "out_indices": [2, 3, 4],
    },
    "encoder_in_channels": [128, 256, 512],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 48,
    "hidden_expansion": 0.5,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 40,
    "decoder_layers": 1,
    "num_queries": 20,
    "id2label": LABELS,
}
HGNET_S = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 24, 32],
    "stage_in_channels": [32, 64, 256, 512],
    "stage_mid_channels": [32, 48, 96, 192],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
}
PREPROCESSOR = {
    "do_normalize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "resample": 3,  # bicubic, as PaddleDetection's configs have it
    "size": {"height": SIZE, "width": SIZE},
}
_DENOISING = "transformer.denoising_class_embed.weight"
# PaddleDetection -> transformers 4.
_TO_TRANSFORMERS = (
    (r"^backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^backbone\.stages\.", "model.backbone.model.encoder.stages."),
    (r"\.aggregation_squeeze_conv\.", ".aggregation.0."),
    (r"\.aggregation_excitation_conv\.", ".aggregation.1."),
    (r"^(model\.backbone\..*)\.conv\.", r"\1.convolution."),
    (r"^(model\.backbone\..*)\.(?:bn|norm)\.", r"\1.normalization."),
    (r"^neck\.input_proj\.", "model.encoder_input_proj."),
    (r"^neck\.encoder\.", "model.encoder.encoder."),
    (r"^(model\.encoder\.encoder\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(model\.encoder\.encoder\..*)\.norm2\.", r"\1.final_layer_norm."),
    (r"^neck\.", "model.encoder."),
    (r"^(model\.encoder\.(?:lateral|fpn|downsample|pan)\w*\..*)\.bn\.", r"\1.norm."),
    (r"^transformer\.input_proj\.(\d)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"^transformer\.input_proj\.(\d)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"^transformer\.decoder\.", "model.decoder."),
    (r"^(model\.decoder\.layers\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(model\.decoder\.layers\..*)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"^(model\.decoder\.layers\..*)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.linear1\.", ".fc1."),
    (r"\.linear2\.", ".fc2."),
    (r"^transformer\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^transformer\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"^transformer\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"^transformer\.", "model."),
)
# What transformers 5 calls the same, in memory.
_TO_TRANSFORMERS_5 = (
    (r"\.fc([12])\.", r".mlp.fc\1."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"^model\.encoder\.encoder\.", "model.encoder.aifi."),
)
_TO_LYUWENYU = (
    (r"^neck\.", "encoder."),
    (r"^(encoder\.(?:lateral|fpn|downsample|pan)\w*\..*)\.bn\.", r"\1.norm."),
    (r"^transformer\.", "decoder."),
)
# RT-DETRv2 calls these otherwise, and its stem's convolutions with padding have one layer before them.
_TO_LYUWENYU_V2 = (
    (r"^decoder\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^decoder\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^encoder\.input_proj\.(\d)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^encoder\.input_proj\.(\d)\.1\.", r"encoder.input_proj.\1.norm."),
    (r"^(backbone\.stem\.stem2[ab]\.conv)\.", r"\1.1."),
)


def random_weights(parameters: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random values for a model's parameters, of sizes that keep its activations in range."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if name.endswith("_variance"):
            values = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            values = random.normal(1.0 if name.endswith(("norm.weight", "bn.weight")) else 0.0, 0.1, shape)
        else:
            fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
            values = random.normal(0, 1.2 / np.sqrt(fan_in), shape)
        weights[name] = values.astype(np.float32)
    return weights


def _replaced(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name.replace("._mean", ".running_mean").replace("._variance", ".running_var")


def _block(name: str) -> tuple[int, int, str] | None:
    """Return stage, index and the rest of a name in ResNet: ``backbone.res3.res3b.short.conv`` -> 1, 1, short.conv."""
    match = re.match(r"backbone\.res(\d)\.res\d([a-z])(\d*)\.(.*)", name)
    if not match:
        return None
    return int(match[1]) - 2, int(match[3]) if match[3] else ord(match[2]) - ord("a"), match[4]


def _in_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Return an array in PyTorch's layout."""
    if name == _DENOISING:
        return np.concatenate([array, np.zeros_like(array[:1])])
    return array.T if array.ndim == 2 else array


def to_transformers(weights: Mapping[str, np.ndarray], version: int = 4) -> dict[str, np.ndarray]:
    """Return PaddleDetection's weights as ``RTDetrForObjectDetection.state_dict()`` has them."""
    state = {}
    for name, array in weights.items():
        new, block = name, _block(name)
        stem = re.match(r"backbone\.conv1\.conv1_(\d)\.(.*)", name)
        if stem:
            new = f"model.backbone.model.embedder.embedder.{int(stem[1]) - 1}.{stem[2]}"
        elif block:
            stage, index, rest = block
            rest = re.sub(r"^branch2([abc])", lambda match: f"layer.{ord(match[1]) - ord('a')}", rest)
            rest = re.sub(r"^short\.conv\.(conv|norm)", r"shortcut.1.\1", rest)
            rest = re.sub(r"^short\.", "shortcut.", rest)
            new = f"model.backbone.model.encoder.stages.{stage}.layers.{index}.{rest}"
        new = _replaced(new, _TO_TRANSFORMERS + (_TO_TRANSFORMERS_5 if version == 5 else ()))
        array = _in_torch(name, array)
        if ".in_proj_" in new:
            for letter, part in zip("qkv", np.split(array, 3)):
                state[new.replace(".in_proj_", f".{letter}_proj.")] = part
        else:
            state[new] = array
    return state


def to_lyuwenyu(weights: Mapping[str, np.ndarray], version: int = 1) -> dict[str, np.ndarray]:
    """Return PaddleDetection's weights under the names of lyuwenyu/RT-DETR (PyTorch)."""
    state = {}
    for name, array in weights.items():
        new, block = name, _block(name)
        if block:
            new = f"backbone.res_layers.{block[0]}.blocks.{block[1]}.{block[2]}"
        state[_replaced(new, _TO_LYUWENYU + (_TO_LYUWENYU_V2 if version == 2 else ()))] = _in_torch(name, array)
    return state


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a ``.safetensors`` file; arrays of uint16 become BF16."""
    kinds = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {
            "dtype": kinds[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_folder(
    folder: Path,
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] = SMALL,
    preprocessor: Mapping[str, Any] | None = PREPROCESSOR,
) -> Path:
    """Write a model folder as ``save_pretrained`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_safetensors(folder / "model.safetensors", state)
    return folder


class _Global:
    """A name that the pickle of PyTorch calls."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes arrays as ``torch.save`` writes tensors."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)
        self.arrays: list[np.ndarray] = []

    def save_global_name(self, value: _Global) -> None:
        module, _, name = value.name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def save_array(self, array: np.ndarray) -> None:
        array = np.array(array, order="C")
        kind = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}[array.dtype.name]
        strides = tuple(step // array.itemsize for step in array.strides)
        self.save_global_name(_Global("torch._utils._rebuild_tensor_v2"))
        self.write(pickle.MARK + pickle.MARK)
        self.save("storage")
        self.save_global_name(_Global(f"torch.{kind}"))
        for value in (str(len(self.arrays)), "cpu", array.size):
            self.save(value)
        self.write(pickle.TUPLE + pickle.BINPERSID)
        self.arrays.append(array)
        for value in (0, array.shape, strides, False, OrderedDict()):
            self.save(value)
        self.write(pickle.TUPLE + pickle.REDUCE)

    dispatch[_Global] = save_global_name
    dispatch[np.ndarray] = save_array


def write_pth(path: Path, content: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint in the format of ``torch.save``; arrays become tensors."""
    import io

    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for index, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{index}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_pickle(path: Path, data: bytes, **members: bytes) -> Path:
    """Write a checkpoint whose ``data.pkl`` is given."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/data/{name[1:]}", content)
    return path
