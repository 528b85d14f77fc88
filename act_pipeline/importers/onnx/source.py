"""An ONNX graph as the importer reads it: nodes, constants, inputs and outputs, with one element type for floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError

# TensorProto.DataType -> Paddle's name. Half and double precision are converted to float32 when a file is read.
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
LOOPS = "its repetitions depend on values; export the model without its post-process"


@dataclass(frozen=True)
class Node:
    """A node of an ONNX graph.

    Attributes:
        type: the op type; with ``domain:`` before it where the domain is not ONNX's own.
        name: the node's name; may be empty.
        inputs: names of the inputs; empty for an optional one that is left out.
        outputs: names of the outputs; empty for one that is not used.
        attrs: attribute name -> value; text as `str`.
        module: dotted name of the PyTorch module that the node was exported from; empty if unknown.
    """

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""

    def has(self, index: int) -> bool:
        """Return whether the optional input of this index is given."""
        return index < len(self.inputs) and bool(self.inputs[index])


def cannot_import(path: Path, node: Node, reason: str) -> UserError:
    """Return the error of a node that cannot be imported.

    Args:
        path: the ONNX file.
        node: the node.
        reason: why, and what to do.
    """
    name = f"node {node.name!r}, " if node.name else ""
    output = next((each for each in node.outputs if each), "")
    return UserError(f"{path}: op {node.type} ({name}output {output!r}) cannot be imported: {reason}")


@dataclass(frozen=True)
class OnnxInput:
    """An input that is fed.

    Attributes:
        name: its name in the ONNX file.
        shape: the shape to convert at, all positive.
        dtype: ``float32``, ``int64``, ...
        open_batch: whether the file leaves the first dimension open.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    open_batch: bool

    @property
    def is_image(self) -> bool:
        """Whether it may be the picture: four dimensions, three channels."""
        return len(self.shape) == 4 and self.shape[1] == 3


@dataclass(frozen=True)
class OnnxSource:
    """A checked ONNX file.

    Attributes:
        path: the file.
        opset: the version of ONNX's own op set.
        inputs: the inputs, in the file's order.
        outputs: names of the outputs.
        nodes: the nodes after simplification, sorted.
        constants: name -> value of the initializers after simplification.
        reference: the ModelProto that the conversion is compared with: not simplified, in float32.
        class_names: names of the classes in the file's metadata; None without.
        named_image: the input that the user named as the picture; None: none was.
    """

    path: Path
    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]
    reference: Any
    class_names: tuple[str, ...] | None = None
    named_image: str | None = None

    @property
    def image(self) -> str | None:
        """Name of the image input: the only one that may be, or the one that was named; None if there is none."""
        found = [each.name for each in self.inputs if each.is_image]
        return found[0] if len(found) == 1 else self.named_image
