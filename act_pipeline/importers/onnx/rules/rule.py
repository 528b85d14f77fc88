"""What all conversion rules share: their type, their error, and the program that they extend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.importers.onnx.source import Node

# A constant up to this many elements is an attribute of an op, a larger one a parameter. Floats of more than one
# element are always parameters: they may be weights or biases.
_INLINE_ELEMENTS = 16
_NO_NAME = re.compile(r"[^A-Za-z0-9_.\-]")
_SHAPE_ONLY = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice", "Gather", "GatherElements")

# Adds the ops of a node; returns its outputs in order.
Rule = Callable[["Build", Node], Union[Any, Sequence[Any]]]


class CannotImport(Exception):
    """A node cannot be converted; the caller adds the node to the reason."""


@dataclass
class Build:
    """A Paddle program under construction, within ``program_guard`` and ``scope_guard``.

    With an open batch, one dimension of a variable may be -1. `shapes` then holds the shapes that the same graph had
    with a fixed batch, from which the rules tell where the batch is.

    Attributes:
        opset: version of the ONNX op set.
        program: the `paddle.static.Program`.
        scope: the `paddle.static.Scope` of the parameters.
        constants: ONNX name -> value of initializers and of what was computed from constants.
        variables: ONNX name -> variable of the program.
        shapes: ONNX name -> shape with the fixed batch; None while the fixed batch itself is built.
        producers: ONNX name -> the node that writes it.
        read_outputs: ONNX names that a node or an output of the graph reads.
    """

    opset: int
    program: Any
    scope: Any
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    shapes: Optional[Mapping[str, tuple[int, ...]]] = None
    producers: Mapping[str, Node] = field(default_factory=dict)
    read_outputs: frozenset[str] = frozenset()
    _parameters: dict[str, Any] = field(default_factory=dict)

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def constant(self, name: str, what: str) -> np.ndarray:
        """Return the value of an input that has to be constant.

        Raises:
            CannotImport: it is computed from the graph's inputs.
        """
        if name not in self.constants:
            raise CannotImport(f"its {what} ({name!r}) is computed at run time, expected a constant")
        return self.constants[name]

    def ints(self, node: Node, index: int, name: str) -> Optional[list[int]]:
        """Return integers that are an attribute in older op sets and an input in later ones; None if left out."""
        if name in node.attrs:
            value = node.attrs[name]
        elif node.has(index):
            value = self.constant(node.inputs[index], name)
        else:
            return None
        return [int(each) for each in np.atleast_1d(value)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value with the fixed batch."""
        if name in self.constants:
            return tuple(self.constants[name].shape)
        found = self.shapes[name] if self.shapes is not None else tuple(self.variables[name].shape)
        if any(dimension < 0 for dimension in found):
            raise CannotImport(f"the shape of its input {name!r}, {list(found)}, depends on values")
        return found

    def rank(self, name: str) -> int:
        return len(self.constants[name].shape if name in self.constants else self.variables[name].shape)

    def dtype(self, name: str) -> str:
        """Return the element type of a value, such as ``float32``."""
        if name in self.constants:
            return str(self.constants[name].dtype)
        return dtype_of(self.variables[name])

    def scalar(self, name: str) -> Optional[float]:
        """Return the value of a constant of one element; None for anything else."""
        value = self.constants.get(name)
        return None if value is None or value.size != 1 else value.reshape(()).item()

    def value(self, name: str) -> Any:
        """Return a value as a variable of the program; constants become parameters or inline constants."""
        if name in self.variables:
            return self.variables[name]
        if name not in self.constants:
            raise CannotImport(f"its input {name!r} is missing")
        made = self.add_constant(name, self.constants[name])
        self.variables[name] = made
        return made

    def values(self, node: Node) -> list[Any]:
        """Return all inputs of a node as variables."""
        return [self.value(name) for name in node.inputs if name]

    def add_constant(self, name: str, value: np.ndarray) -> Any:
        """Return a constant as a variable: a parameter, or inline if it is small.

        Args:
            name: its ONNX name, from which the parameter's is made.
            value: its value; half and double precision become float32.
        """
        import paddle

        if value.dtype == object or value.dtype.kind in "USc":
            raise CannotImport(f"the constant {name!r} holds {value.dtype}, expected numbers")
        if value.dtype in (np.float16, np.float64):
            value = value.astype(np.float32)
        if value.dtype in (np.uint16, np.uint32, np.uint64):
            value = value.astype(np.int64)
        if value.size == 0:
            raise CannotImport(f"the constant {name!r} is empty, {list(value.shape)}")
        if value.size == 1 or (value.size <= _INLINE_ELEMENTS and value.dtype.kind in "ib"):
            if value.dtype.kind in "iu" and value.dtype not in (np.int32, np.int64):  # assign has no narrower ones
                return paddle.cast(self.add_constant(name, value.astype(np.int32)), str(value.dtype))
            made = paddle.assign(np.ascontiguousarray(value.reshape(value.shape or (1,))))
            return made if value.ndim else paddle.reshape(made, [])
        return self.parameter(name, value)

    def parameter(self, name: str, value: np.ndarray, variant: str = "") -> Any:
        """Return a parameter of the program, made once for each name and variant.

        Args:
            name: its ONNX name; what Paddle's names cannot hold is replaced.
            value: its value.
            variant: says how the value differs from the initializer of that name, such as ``transposed``.
        """
        key = f"{name}\n{variant}"
        if key in self._parameters:
            return self._parameters[key]
        block = self.program.global_block()
        legal = _NO_NAME.sub("_", (f"{name}.{variant}" if variant else name).replace("/", ".")).strip(".") or "constant"
        if ".tmp_" in legal or legal.startswith(("feed", "fetch", "save_infer_model")):  # Paddle's own names
            legal = f"constant.{legal.replace('.tmp_', '.')}"
        free, number = legal, 1
        while block.has_var(free) or self.scope.find_var(free) is not None:
            number += 1
            free = f"{legal}_{number}"
        value = np.ascontiguousarray(value)
        if value.dtype == np.float32:
            made = block.create_parameter(name=free, shape=list(value.shape), dtype="float32")
        else:
            made = block.create_var(
                name=free, shape=list(value.shape), dtype=str(value.dtype), persistable=True, stop_gradient=True
            )
        import paddle

        self.scope.var(free).get_tensor().set(value, paddle.CPUPlace())
        self._parameters[key] = made
        return made

    def reshape(self, value: Any, before: Sequence[int], after: Sequence[int]) -> Any:
        """Reshape a variable; where its batch is open, find the batch's place in the new shape.

        The batch is the outermost part of the open dimension, so it stays behind the same number of elements.

        Args:
            value: the variable.
            before: its shape with the fixed batch.
            after: the new shape with the fixed batch.

        Raises:
            CannotImport: the new shape merges the open batch into an outer dimension.
        """
        import paddle

        target = [int(size) for size in after]
        if any(size == 0 for size in target):
            raise CannotImport(f"its result is empty, {target}")
        axis = open_axis(value)
        if axis is not None:
            lead = math.prod(before[:axis])
            fits = [index for index in range(len(target)) if math.prod(target[:index]) == lead]
            if not fits:
                raise CannotImport(f"a reshape from {list(before)} to {target} moves the open batch")
            target[axis if axis in fits else fits[0]] = -1
        return paddle.reshape(value, target)

    def with_batch_of(self, value: Any, like: Any) -> Any:
        """Repeat a value along the open dimension of another one of the same rank, where its own size there is 1."""
        import paddle

        axis = open_axis(like)
        if axis is None or open_axis(value) is not None or len(value.shape) != len(like.shape):
            return value
        if value.shape[axis] != 1:
            raise CannotImport(f"a constant of shape {list(value.shape)} is not the same for each image of the batch")
        repeats: list[Any] = [1] * len(value.shape)
        repeats[axis] = paddle.slice(paddle.shape(like), [0], [axis], [axis + 1])
        made = paddle.tile(value, repeats)
        return made

    def is_index(self, name: str) -> bool:
        """Return whether a value holds indices, which are not negative."""
        for _ in range(20):
            node = self.producers.get(name)
            if node is None:
                return bool(name in self.constants and (self.constants[name] >= 0).all())
            if node.type in ("TopK", "ArgMax", "ArgMin", "Shape", "Range"):
                return node.type != "TopK" or name == node.outputs[-1]
            if node.type not in _SHAPE_ONLY:
                return False
            name = node.inputs[0]
        return False

    def refuse_outputs(self, node: Node, first: int) -> None:
        """Check that no output from the given index on is read.

        Raises:
            CannotImport: one is.
        """
        for name in node.outputs[first:]:
            if name in self.read_outputs:
                raise CannotImport(f"its output {name!r} is used, expected only {node.outputs[0]!r}")


def open_axis(value: Any) -> Optional[int]:
    """Return the index of the open dimension of a variable; None if all are fixed.

    Raises:
        CannotImport: several are open.
    """
    found = [index for index, size in enumerate(value.shape) if size < 0]
    if len(found) > 1:
        raise CannotImport(f"several dimensions of its input are open, {list(value.shape)}")
    return found[0] if found else None


def dtype_of(value: Any) -> str:
    """Return the element type of a variable, such as ``float32``."""
    return str(value.dtype).rsplit(".", 1)[-1].lower().replace("fp32", "float32").replace("fp16", "float16")


def axis_of(value: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        CannotImport: there is no such axis.
    """
    if not -rank <= value < max(rank, 1):
        raise CannotImport(f"its axis is {value}, expected one of a value with {rank} dimensions")
    return value % rank if rank else 0
