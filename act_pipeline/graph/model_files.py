"""Checks of a model's program and parameters file before a runtime loads them; reading and writing of parameters.

Paddle 2.6.2 crashes (SIGSEGV) on a ``.pdmodel`` that is not a program, loads a truncated ``.pdiparams`` without an
error, and reports other damage with a C++ traceback. Here the program and the headers of the parameters are checked
first, which takes milliseconds, and errors are one line.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

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
_NOT_SAVED_TYPES = ("FEED_MINIBATCH", "FETCH_LIST", "RAW")
_QUANTIZATION_OPS = ("quantize_linear", "dequantize_linear", "quantize", "dequantize", "requantize")
_MAX_DESC_BYTES = 1 << 16


@dataclass(frozen=True)
class ModelSummary:
    """Inputs, outputs, ops and parameters of a model.

    Attributes:
        inputs: name -> shape, -1 for a dynamic dimension, in the order of the feed ops.
        outputs: names in the order of the fetch ops.
        op_counts: op type -> number of ops.
        parameters: name -> shape of each tensor in the parameters file.
        float_stored_weights: names of quantized weights that are not stored as int8.
        half_parameters: names of parameters stored as float16 or bfloat16.
        activations: name -> shape of all other tensors, -1 for a dynamic dimension.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    op_counts: Mapping[str, int]
    parameters: Mapping[str, tuple[int, ...]]
    float_stored_weights: tuple[str, ...] = ()
    half_parameters: tuple[str, ...] = ()
    activations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Output name -> shape, -1 for a dynamic dimension, in the order of the fetch ops."""
        return {name: self.activations.get(name, ()) for name in self.outputs}

    @property
    def quantized(self) -> bool:
        """Whether the program holds Q/DQ ops, those of oneDNN or fake-quantization ops, that is, is an INT8 model."""
        return any(op in _QUANTIZATION_OPS or op.startswith("fake_") for op in self.op_counts)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the network's input in pixels; None if they are dynamic."""
        shape = self.inputs.get("image", ())
        return (shape[2], shape[3]) if len(shape) == 4 and shape[2] > 0 and shape[3] > 0 else None


def inspect_model(model: InferenceModel) -> ModelSummary:
    """Read the program and the headers of the parameters, and check that they match.

    Args:
        model: the model to inspect.

    Returns:
        A summary of the model.

    Raises:
        UserError: a file is truncated or of another kind, or the two are not from the same export.
    """
    program = read_program(model.model_path)
    try:
        return _summarize(model, program)
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{model.model_path} contradicts itself ({type(error).__name__}: {error}), expected an exported "
            "program; copy or export it again"
        ) from None


def _summarize(model: InferenceModel, program: Any) -> ModelSummary:
    block = program.blocks[0]
    variables = {variable.name: variable for variable in block.vars}
    op_counts = Counter(op.type for part in program.blocks for op in part.ops)
    if not all(isinstance(name, str) for name in (*variables, *op_counts)):  # protobuf returns bytes if not UTF-8
        raise ValueError("a name is no text")
    feeds = sorted((_column(op), op.outputs[0].arguments[0]) for op in block.ops if op.type == "feed")
    fetches = sorted((_column(op), op.inputs[0].arguments[0]) for op in block.ops if op.type == "fetch")
    if not feeds or not fetches:
        raise UserError(
            f"{model.model_path} has {len(feeds)} inputs and {len(fetches)} outputs, expected an exported inference "
            "program; export the model again with tools/export_model.py"
        )
    for what, ops in (("input", feeds), ("output", fetches)):
        columns = [column for column, _ in ops]
        if columns != list(range(len(ops))):  # Paddle writes to this index unchecked and crashes
            raise UserError(
                f"{model.model_path} numbers its {what}s {columns}, expected {list(range(len(ops)))}; copy or "
                "export it again"
            )
    expected = {
        name: _shape(variables[name])
        for name in sorted(variables)
        if variables[name].persistable and _type_name(variables[name]) not in _NOT_SAVED_TYPES
    }
    stored_types = _check_parameters(model, expected)
    quantized_weights = {
        slot.arguments[0]
        for op in block.ops
        if op.type == "dequantize_linear"
        for slot in op.inputs
        if slot.parameter == "X" and slot.arguments[0] in expected
    }
    return ModelSummary(
        inputs={name: _shape(variables[name]) for _, name in feeds},
        outputs=tuple(name for _, name in fetches),
        op_counts=op_counts,
        parameters=expected,
        float_stored_weights=tuple(sorted(name for name in quantized_weights if stored_types[name] != "int8")),
        half_parameters=tuple(name for name, kind in stored_types.items() if kind in ("float16", "bfloat16")),
        activations={name: _shape(variable) for name, variable in variables.items() if not variable.persistable},
    )


def read_parameters(model: InferenceModel, summary: ModelSummary) -> dict[str, np.ndarray]:
    """Return the values of all parameters in their stored types.

    Args:
        model: a model that has passed :func:`inspect_model`.
        summary: the result of :func:`inspect_model`.

    Returns:
        name -> value; INT8 weights as int8, bfloat16 as uint16 with the same bits.
    """
    path, size = model.params_path, model.params_path.stat().st_size
    names = sorted(summary.parameters)
    values: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        for shape, element_type in _parameter_headers(file, size, path, len(names)):
            # NumPy has no bfloat16; uint16 has the same bits.
            kind = np.dtype("uint16" if element_type == "bfloat16" else element_type)
            count = math.prod(shape)
            file.seek(-count * kind.itemsize, os.SEEK_CUR)
            values[names[len(values)]] = np.frombuffer(file.read(count * kind.itemsize), kind).reshape(shape)
    return values


def write_parameters(model: InferenceModel, values: Mapping[str, np.ndarray]) -> None:
    """Write a model's parameters file in the layout of :func:`_parameter_headers`.

    Args:
        model: the model whose file to write.
        values: name -> value of every persistable variable of its program.
    """
    from paddle.base.proto import framework_pb2

    codes = {name: code for code, (name, _) in _ELEMENT_TYPES.items()}
    desc = framework_pb2.VarType.TensorDesc()  # reused, see _parameter_headers
    with open(model.params_path, "wb") as file:
        for name in sorted(values):
            value = np.ascontiguousarray(values[name])
            desc.data_type = codes[value.dtype.name]
            desc.dims[:] = value.shape
            raw = desc.SerializeToString()
            file.write(struct.pack("<IQIi", 0, 0, 0, len(raw)) + raw)
            file.write(value.tobytes())


def read_program(path: Path) -> Any:
    """Parse a ``.pdmodel`` to a ``framework_pb2.ProgramDesc``.

    Args:
        path: the ``.pdmodel`` file.

    Raises:
        UserError: the file is truncated or not a program, or the program is empty.
    """
    # The generated classes are the only description of ProgramDesc in the wheel of Paddle 2.6.
    from google.protobuf.message import DecodeError
    from paddle.base.proto import framework_pb2

    program = framework_pb2.ProgramDesc()
    try:
        program.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError):
        raise UserError(
            f"{path} is truncated or no Paddle program ({path.stat().st_size} bytes); copy or export it again"
        ) from None
    if not program.blocks or not program.blocks[0].ops:
        raise UserError(f"{path} holds no operators, expected an exported program; copy or export it again")
    return program


def _column(op: Any) -> int:
    return next((attribute.i for attribute in op.attrs if attribute.name == "col"), 0)


def _type_name(variable: Any) -> str:
    return type(variable.type).Type.Name(variable.type.type)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.type.lod_tensor.tensor.dims)


def _check_parameters(model: InferenceModel, expected: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the stored element type of each parameter; the program declares INT8 weights as float32."""
    path = model.params_path
    size = path.stat().st_size
    names = list(expected)
    remedy = f"copy {model.model_filename} and {model.params_filename} of the same export again"
    types: dict[str, str] = {}
    with open(path, "rb") as file:
        for shape, element_type in _parameter_headers(file, size, path, len(names)):
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


def _parameter_headers(file: BinaryIO, size: int, path: Path, total: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the shape and element type of each tensor of a ``save_combine`` file, sorted by name as Paddle writes them.

    Layout of a tensor (paddle/fluid/framework/lod_tensor.cc and tensor_util.cc, 2.6), little-endian: u32 version 0; u64
    number of LoD levels; for each level, u64 size in bytes and the level; u32 version 0; i32 size in bytes of a
    ``TensorDesc`` protobuf and the protobuf; the data.
    """
    from paddle.base.proto import framework_pb2

    # Reused: at every 10,000th freed message, protobuf 7 returns the free memory of the process to the system.
    desc = framework_pb2.VarType.TensorDesc()
    index = 0

    def take(layout: str) -> Any:
        raw = file.read(struct.calcsize(layout))
        if len(raw) < struct.calcsize(layout):
            raise _truncated(path, size, index, total)
        return struct.unpack(layout, raw)[0]

    while file.tell() < size:
        if take("<I") != 0:
            raise _not_parameters(path, index)
        levels = take("<Q")
        if levels > 16:
            raise _not_parameters(path, index)
        for _ in range(levels):
            level_bytes = take("<Q")
            if file.tell() + level_bytes > size:
                raise _truncated(path, size, index, total)
            file.seek(level_bytes, 1)
        if take("<I") != 0:
            raise _not_parameters(path, index)
        desc_bytes = take("<i")
        if not 0 < desc_bytes < _MAX_DESC_BYTES:
            raise _not_parameters(path, index)
        raw = file.read(desc_bytes)
        if len(raw) < desc_bytes:
            raise _truncated(path, size, index, total)
        try:
            desc.ParseFromString(raw)
        except Exception:  # DecodeError, or ValueError in other implementations of protobuf
            raise _not_parameters(path, index) from None
        if desc.data_type not in _ELEMENT_TYPES or any(dimension < 0 for dimension in desc.dims):
            raise _not_parameters(path, index)
        elements = 1
        for dimension in desc.dims:
            elements *= dimension
        end = file.tell() + elements * _ELEMENT_TYPES[desc.data_type][1]
        if end > size:
            raise _truncated(path, size, index, total)
        file.seek(end)
        yield tuple(desc.dims), _ELEMENT_TYPES[desc.data_type][0]
        index += 1


def _truncated(path: Path, size: int, index: int, total: int) -> UserError:
    return UserError(
        f"{path} is truncated: its {size} bytes end inside parameter {index + 1} of {total}; copy or export it again"
    )


def _not_parameters(path: Path, index: int) -> UserError:
    return UserError(
        f"{path} is no Paddle parameters file (parameter {index + 1} has no valid header); copy or export it again"
    )
