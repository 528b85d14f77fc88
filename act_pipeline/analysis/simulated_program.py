"""Programs in which a subset of ops computes in INT8."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.analysis.dataflow import DataFlow
from act_pipeline.graph.int8_rounding import rounded_weight
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph

_ZERO_POINT = "act_pipeline@zero_point"
_INT_ATTRIBUTE = 0  # AttrType.INT of Paddle's framework.proto


def scale_name(tensor: str) -> str:
    """Return the name of the tensor in the scope that holds an activation's threshold, float32 [1]."""
    return f"{tensor}@threshold"


def set_tensor(graph: StaticGraph, name: str, value: np.ndarray) -> None:
    """Set a tensor in a graph's scope, on the device of its executor."""
    graph.scope.var(name).get_tensor().set(np.ascontiguousarray(value), graph.executor.place)


class ProgramBuilder:
    """Builds programs over the parameters of one graph, and adds INT8-rounded weights to its scope."""

    def __init__(self, graph: StaticGraph, template: Any, flow: DataFlow, ops: Mapping[str, QuantizableOp]) -> None:
        """Prepare to build.

        Args:
            graph: the loaded graph.
            template: its program as a protobuf message, without ops; persistable tensors stay in the scope.
            flow: the ops of the graph.
            ops: name -> op that can be quantized.
        """
        self._graph, self._template, self._flow, self._ops = graph, template, flow, ops
        self._rounded: set[str] = set()

    def build(
        self,
        positions: Sequence[int],
        quantized: Collection[str],
        weight_only: Collection[str],
        transient: Collection[str],
    ) -> Any:
        """Return a `paddle.static.Program`.

        Args:
            positions: the ops to compute, see :class:`DataFlow`.
            quantized: names of ops whose activations and weight are rounded to INT8.
            weight_only: names of ops of which only the weight is rounded.
            transient: tensors that need not stay in the scope.
        """
        import paddle

        desc = copy.deepcopy(self._template)
        block = _Block(desc.blocks[0])
        for name in transient:
            block.described[name].persistable = False
        for index in positions:
            name = self._flow.writes[index][0]
            replaced: dict[str, str] = {}
            if name in quantized:
                replaced.update({tensor: self._add_rounding(block, tensor) for tensor in self._ops[name].activations})
            if name in quantized or name in weight_only:
                replaced.update(self._replaced_weight(block, self._ops[name]))
            block.append(self._flow.nodes[index], replaced)
        return paddle.static.Program.parse_from_string(desc.SerializeToString())

    def _add_rounding(self, block: _Block, tensor: str) -> str:
        """Append the ops that round ``tensor`` to INT8, the same as in a saved INT8 model, unless they are there."""
        rounded = f"{tensor}@dequantized"
        if rounded in block.described:
            return rounded
        scale = scale_name(tensor)
        block.declare(scale, tensor, shape=[1])
        if _ZERO_POINT not in block.described:
            block.declare(_ZERO_POINT, tensor, shape=[1])
            set_tensor(self._graph, _ZERO_POINT, np.zeros(1, np.float32))
        source = tensor
        for kind in ("quantize", "dequantize"):
            result = f"{tensor}@{kind}d"
            block.declare(result, tensor)
            block.append_rounding(f"{kind}_linear", source, scale, result)
            source = result
        return rounded

    def _replaced_weight(self, block: _Block, op: QuantizableOp) -> dict[str, str]:
        """Return an op's weight -> the name of its INT8-rounded copy, which is created at its first use."""
        if op.weight is None:
            return {}
        name = f"{op.weight}@rounded{op.weight_axis}"
        if name not in self._rounded:
            set_tensor(self._graph, name, rounded_weight(self._graph.parameter(op.weight), op.weight_axis))
            self._rounded.add(name)
        block.declare(name, op.weight, persistable=True)
        return {op.weight: name}


class _Block:
    """A block of a program as a protobuf message, to which ops and tensors are appended."""

    def __init__(self, block: Any) -> None:
        self._block = block
        self.described = {variable.name: variable for variable in block.vars}

    def declare(self, name: str, like: str, persistable: bool = False, shape: Sequence[int] | None = None) -> None:
        """Declare a tensor like another one, unless it is there; with another shape it is persistable."""
        if name in self.described:
            return
        variable = self._block.vars.add()
        variable.CopyFrom(self.described[like])
        variable.name = name
        variable.persistable = persistable or shape is not None
        if shape is not None:
            variable.type.lod_tensor.tensor.dims[:] = shape
        self.described[name] = variable

    def append(self, node: Any, replaced: Mapping[str, str]) -> None:
        """Append a copy of an op that reads the replacements of its inputs."""
        added = self._block.ops.add()
        added.CopyFrom(node)
        for slot in added.inputs if replaced else ():
            slot.arguments[:] = [replaced.get(argument, argument) for argument in slot.arguments]

    def append_rounding(self, op_type: str, source: str, scale: str, result: str) -> None:
        """Append a ``quantize_linear`` or ``dequantize_linear`` op."""
        op = self._block.ops.add(type=op_type)
        for slot, argument in (("X", source), ("Scale", scale), ("ZeroPoint", _ZERO_POINT)):
            op.inputs.add(parameter=slot, arguments=[argument])
        op.outputs.add(parameter="Y", arguments=[result])
        for name, value in (("quant_axis", -1), ("bit_length", 8)):
            op.attrs.add(name=name, type=_INT_ATTRIBUTE, i=value)
