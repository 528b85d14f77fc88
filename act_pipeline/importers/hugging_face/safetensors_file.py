"""Reading of ``.safetensors``: 8 bytes with the length of a JSON header, the header, then the tensors' bytes.

Nothing in such a file is code. Everything that the header says is checked against the size of the file before an array
is made, so a hostile file cannot use more memory than it has bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError

_LENGTH_BYTES = 8
# The weights of the largest RT-DETR have 0.3 GB.
_MAX_BYTES = 4 << 30
# The header of an RT-DETR has about 100 kB; the format's own limit is 100 MB.
_MAX_HEADER_BYTES = 25 << 20
_MAX_DIMENSIONS = 8
_METADATA = "__metadata__"
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the tensors of floating-point numbers of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        name -> array, float32 whatever the file has (F64, F32, F16 or BF16). Tensors of integers (such as
        ``num_batches_tracked``) are left out.

    Raises:
        UserError: the file is missing, cut off, or not as the format demands.
    """
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path) or size > _MAX_BYTES:
            raise UserError(f"{path} is no file of at most {_MAX_BYTES >> 30} GiB, expected the weights of an RT-DETR")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a .safetensors file") from None
    header, data = _split(path, content)
    arrays = {}
    for name, entry, start, end in _entries(path, header, len(data)):
        kind = entry["dtype"]
        if kind == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data[start:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in _FLOATS:
            values = np.frombuffer(data[start:end], _FLOATS[kind]).astype(np.float32)
        elif kind.startswith("F"):
            raise UserError(
                f"{path}: {name} holds {kind}, expected F32, F16 or BF16; save the model in one of these: "
                "model.float().save_pretrained(FOLDER)"
            )
        else:
            continue
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _split(path: str | os.PathLike[str], content: bytes) -> tuple[Mapping[str, Any], memoryview]:
    """Return the parsed header and the bytes after it."""
    size = struct.unpack("<Q", content[:_LENGTH_BYTES])[0] if len(content) >= _LENGTH_BYTES else None
    if size is None or size > min(len(content) - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        found = f"{len(content)} bytes" if size is None else f"a header of {size} bytes in a file of {len(content)}"
        raise UserError(f"{path} has {found}, expected a whole .safetensors file; download it again")
    end = _LENGTH_BYTES + size
    try:
        header = json.loads(content[_LENGTH_BYTES:end].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is no JSON of .safetensors ({error}); download it again") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is {type(header).__name__}, expected an object; download it again")
    return header, memoryview(content)[end:]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _entries(
    path: str | os.PathLike[str], header: Mapping[str, Any], data_bytes: int
) -> list[tuple[str, Mapping[str, Any], int, int]]:
    """Return name, entry, start and end of each tensor in the order of the data, checked to fill it without a gap."""
    entries = []
    for name, entry in header.items():
        if name == _METADATA:
            continue
        fields = entry if isinstance(entry, dict) else {}
        kind: Any = fields.get("dtype")
        shape: Any = fields.get("shape")
        offsets: Any = fields.get("data_offsets")
        if not (isinstance(kind, str) and kind in _ITEM_BYTES):
            raise UserError(
                f"{path}: {_shown(name)} has dtype {_shown(kind)}, expected one of {', '.join(_ITEM_BYTES)}"
            )
        if not (
            _are_counts(shape, least=1)
            and len(shape) <= _MAX_DIMENSIONS
            and _are_counts(offsets, least=0)
            and len(offsets) == 2
        ):
            raise UserError(
                f"{path}: {_shown(name)} has shape {_shown(shape)} and data_offsets {_shown(offsets)}, expected "
                "lengths of at least 1, and two offsets; download it again"
            )
        start, end = offsets
        if end > data_bytes or end - start != math.prod(shape) * _ITEM_BYTES[kind]:
            raise UserError(
                f"{path}: {_shown(name)}, {kind} {_shown(shape)}, has data_offsets {_shown(offsets)} of {data_bytes} "
                "bytes, which do not fit it; download it again"
            )
        entries.append((name, entry, start, end))
    entries.sort(key=lambda entry: entry[2:])
    position = 0
    for name, _, start, end in entries:
        if start != position:
            raise UserError(
                f"{path}: {_shown(name)} begins at byte {start}, expected {position}, the end of the tensor before it; "
                "download it again"
            )
        position = end
    if position != data_bytes:
        raise UserError(f"{path} has {data_bytes} bytes of data, its header names {position}; download it again")
    return entries


def _are_counts(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < 1 << 62 for value in values)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) or _are_counts(value, least=-(1 << 62)) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
