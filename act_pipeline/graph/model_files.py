"""Checks of a model's program and parameters file before a runtime loads them.

Paddle 2.6.2 crashes (SIGSEGV) on a ``.pdmodel`` that is not a program, loads a truncated ``.pdiparams`` without an
error, and reports other damage with a C++ traceback. Here the program and the headers of the parameters are checked
first, which takes milliseconds, and errors are one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.parameters_file import check_parameters
from act_pipeline.graph.program_desc import dtype_of_tensor, sizes_of_tensors

_NOT_SAVED_TYPES = ("FEED_MINIBATCH", "FETCH_LIST", "RAW")
_QUANTIZATION_OPS = ("quantize_linear", "dequantize_linear", "quantize", "dequantize", "requantize")


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
        input_dtypes: input name -> dtype, such as ``float32`` and ``int64``.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    op_counts: Mapping[str, int]
    parameters: Mapping[str, tuple[int, ...]]
    float_stored_weights: tuple[str, ...] = ()
    half_parameters: tuple[str, ...] = ()
    activations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    input_dtypes: Mapping[str, str] = field(default_factory=dict)

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
    variables, shapes = {variable.name: variable for variable in block.vars}, sizes_of_tensors(block)
    op_counts = Counter(op.type for part in program.blocks for op in part.ops)
    if not all(isinstance(name, str) for name in (*variables, *op_counts)):  # protobuf returns bytes if not UTF-8
        raise ValueError("a name is no text")
    inputs, outputs = _inputs_and_outputs(model, block)
    parameters = {
        name: shapes[name]
        for name in sorted(variables)
        if variables[name].persistable and _type_name(variables[name]) not in _NOT_SAVED_TYPES
    }
    stored_types = check_parameters(model, parameters)
    quantized = sorted(name for name in _dequantized(block) if name in parameters)
    return ModelSummary(
        inputs={name: shapes[name] for name in inputs},
        outputs=tuple(outputs),
        op_counts=op_counts,
        parameters=parameters,
        float_stored_weights=tuple(name for name in quantized if stored_types[name] != "int8"),
        half_parameters=tuple(name for name, kind in stored_types.items() if kind in ("float16", "bfloat16")),
        activations={name: shapes[name] for name, variable in variables.items() if not variable.persistable},
        input_dtypes={name: dtype_of_tensor(variables[name]) for name in inputs},
    )


def _inputs_and_outputs(model: InferenceModel, block: Any) -> tuple[list[str], list[str]]:
    """Return the names that the feed and fetch ops write and read, in the order of their columns."""
    feeds = sorted((_column(op), op.outputs[0].arguments[0]) for op in block.ops if op.type == "feed")
    fetches = sorted((_column(op), op.inputs[0].arguments[0]) for op in block.ops if op.type == "fetch")
    if not feeds or not fetches:
        raise UserError(
            f"{model.model_path} has {len(feeds)} inputs and {len(fetches)} outputs, expected an exported inference "
            "program; export the model again with tools/export_model.py"
        )
    for what, ends in (("input", feeds), ("output", fetches)):
        columns = [column for column, _ in ends]
        if columns != list(range(len(ends))):  # Paddle writes to this index unchecked and crashes
            raise UserError(
                f"{model.model_path} numbers its {what}s {columns}, expected {list(range(len(ends)))}; copy or "
                "export it again"
            )
    return [name for _, name in feeds], [name for _, name in fetches]


def _dequantized(block: Any) -> set[str]:
    return {
        slot.arguments[0]
        for op in block.ops
        if op.type == "dequantize_linear"
        for slot in op.inputs
        if slot.parameter == "X"
    }


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
