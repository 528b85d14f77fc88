"""Paddle's parameters files (``save_combine``): reading, writing, and checks that Paddle itself does not do.

Layout of a tensor (paddle/fluid/framework/lod_tensor.cc and tensor_util.cc, 2.6), little-endian: u32 version 0; u64
number of LoD levels; for each level, u64 size in bytes and the level; u32 version 0; i32 size in bytes of a
``TensorDesc`` protobuf and the protobuf; the data. The tensors are sorted by name; the file does not contain the names.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError

# VarType.Type of framework.proto (Paddle 2.6) -> (name, in NumPy's terms, bytes of an element).
_ELEMENT_TYPES = {
    0: ("bool", 1),
    1: ("int16", 2),
    2: ("int32", 4),
    3: ("int64", 8),
    4: ("float16", 2),
    5: ("float32", 4),
    6: ("float64", 8),
    20: ("uint8", 1),
    21: ("int8", 1),
    22: ("bfloat16", 2),
    23: ("complex64", 8),
    24: ("complex128", 16),
}
_MAX_LOD_LEVELS = 16
_MAX_DESC_BYTES = 1 << 16


def check_parameters(model: InferenceModel, expected: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Check that a model's parameters file has the expected tensors.

    Args:
        model: the model whose file to check.
        expected: name -> shape of every parameter, sorted by name.

    Returns:
        name -> the stored element type, in NumPy's terms; the program declares INT8 weights as float32.

    Raises:
        UserError: the file is truncated or of another kind, or has other tensors.
    """
    path, names = model.params_path, list(expected)
    remedy = f"copy {model.model_filename} and {model.params_filename} of the same export again"
    types: dict[str, str] = {}
    with open(path, "rb") as file:
        for shape, element_type in _Headers(file, path, len(names)):
            count = len(types)
            if count == len(names):
                raise UserError(
                    f"{path} holds more than the {count} parameters that {model.model_filename} has; {remedy}"
                )
            if shape != expected[names[count]]:
                raise UserError(
                    f"{path} is not of the same export as {model.model_filename}: parameter {names[count]} is "
                    f"{list(shape)}, expected {list(expected[names[count]])}; {remedy}"
                )
            types[names[count]] = element_type
    count = len(types)
    if count != len(names):
        raise UserError(
            f"{path} is truncated: it holds {count} parameters, {model.model_filename} has {len(names)}; {remedy}"
        )
    return types


def read_parameters(model: InferenceModel, parameters: Collection[str]) -> dict[str, np.ndarray]:
    """Return the values of all parameters in their stored types.

    Args:
        model: a model that has passed :func:`act_pipeline.graph.model_files.inspect_model`.
        parameters: the names of its parameters.

    Returns:
        name -> value; INT8 weights as int8, bfloat16 as uint16 with the same bits.
    """
    names = sorted(parameters)
    values: dict[str, np.ndarray] = {}
    with open(model.params_path, "rb") as file:
        for shape, element_type in _Headers(file, model.params_path, len(names)):
            # NumPy has no bfloat16; uint16 has the same bits.
            kind = np.dtype("uint16" if element_type == "bfloat16" else element_type)
            count = math.prod(shape)
            file.seek(-count * kind.itemsize, os.SEEK_CUR)
            values[names[len(values)]] = np.frombuffer(file.read(count * kind.itemsize), kind).reshape(shape)
    return values


def write_parameters(model: InferenceModel, values: Mapping[str, np.ndarray]) -> None:
    """Write a model's parameters file in Paddle's layout.

    Args:
        model: the model whose file to write.
        values: name -> value of every persistable variable of its program.
    """
    from paddle.base.proto import framework_pb2

    codes = {name: code for code, (name, _) in _ELEMENT_TYPES.items()}
    desc = framework_pb2.VarType.TensorDesc()  # reused, see _Headers
    with open(model.params_path, "wb") as file:
        for name in sorted(values):
            value = np.ascontiguousarray(values[name])
            desc.data_type = codes[value.dtype.name]
            desc.dims[:] = value.shape
            raw = desc.SerializeToString()
            file.write(struct.pack("<IQIi", 0, 0, 0, len(raw)) + raw)
            file.write(value.tobytes())


class _Headers:
    """The headers of the tensors in a file, which is left after the data of the tensor whose header was yielded."""

    def __init__(self, file: BinaryIO, path: Path, total: int) -> None:
        """Prepare to read a file opened in binary mode; ``total`` is the expected number of tensors, for messages."""
        from paddle.base.proto import framework_pb2

        self._file, self._path, self._total = file, path, total
        self._size = path.stat().st_size
        self._index = 0
        # Reused: at every 10,000th freed message, protobuf 7 returns the free memory of the process to the system.
        self._desc = framework_pb2.VarType.TensorDesc()

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield the shape and element type of each tensor, sorted by name as Paddle writes them.

        Raises:
            UserError: the file is truncated, or not a parameters file.
        """
        while self._file.tell() < self._size:
            self._require(self._number("<I") == 0)
            self._skip_lod_levels()
            self._require(self._number("<I") == 0)
            self._read_desc()
            name, item_bytes = _ELEMENT_TYPES[self._desc.data_type]
            self._skip(math.prod(self._desc.dims) * item_bytes)
            yield tuple(self._desc.dims), name
            self._index += 1

    def _skip_lod_levels(self) -> None:
        levels = self._number("<Q")
        self._require(levels <= _MAX_LOD_LEVELS)
        for _ in range(levels):
            self._skip(self._number("<Q"))

    def _read_desc(self) -> None:
        count = self._number("<i")
        self._require(0 < count < _MAX_DESC_BYTES)
        raw = self._take(count)
        try:
            self._desc.ParseFromString(raw)
        except Exception:  # DecodeError, or ValueError in other implementations of protobuf
            self._require(False)
        self._require(self._desc.data_type in _ELEMENT_TYPES and all(dimension >= 0 for dimension in self._desc.dims))

    def _number(self, layout: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        raw = self._file.read(count)
        if len(raw) < count:
            raise self._truncated()
        return raw

    def _skip(self, count: int) -> None:
        end = self._file.tell() + count
        if end > self._size:
            raise self._truncated()
        self._file.seek(end)

    def _truncated(self) -> UserError:
        return UserError(
            f"{self._path} is truncated: its {self._size} bytes end inside parameter {self._index + 1} of "
            f"{self._total}; copy or export it again"
        )

    def _require(self, valid: bool) -> None:
        if not valid:
            raise UserError(
                f"{self._path} is no Paddle parameters file (parameter {self._index + 1} has no valid header); copy or "
                "export it again"
            ) from None
