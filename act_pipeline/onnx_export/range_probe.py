"""An INT8 ONNX file made to tell how many of its activations are beyond the ranges that they are rounded to.

Beside each QuantizeLinear of an activation the share of elements is computed that the rounding clips; these shares are
all that the new file outputs, so that what only served the detections falls away.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.onnx_export.graph_builder import require_onnx

OUTPUT = "beyond_range"
_NUMBER = re.compile(r"/\d+$")


def write_range_probe(source: Path, target: Path) -> tuple[str, ...]:
    """Write the probe of an INT8 file: the same inputs, one output ``beyond_range``, float32 [T].

    An element ``x`` of a tensor with the scale ``s`` and the zero point ``z`` is beyond its range if ``x / s + z`` is
    more than half a step beyond the least or the largest integer: then clipping changes it by more than rounding does
    to the others. So is NaN. The share is over all elements of a batch.

    Args:
        source: an ONNX file whose activations are rounded by QuantizeLinear with one constant scale and zero point.
        target: the file to write.

    Returns:
        The names of the T tensors, in the order of the output: those of the Paddle program, without the numbers that
        the export adds, which change with its code. A second one of the same name ends with ``#2``.

    Raises:
        UserError: no activation is rounded so.
    """
    onnx = require_onnx()
    proto = onnx.load(str(source))
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranges: dict[tuple[str, float, float], str] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            found = _range(onnx, node, constants)
            if found is not None:
                ranges.setdefault((node.input[0], *found), node.output[0])
    if not ranges:
        raise UserError(f"{source} rounds no activation with a constant scale, expected an INT8 model")
    shares = [_add_share(onnx, graph, place, *key) for place, key in enumerate(ranges)]
    graph.node.append(onnx.helper.make_node("Concat", shares, [OUTPUT], name=OUTPUT, axis=0))
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, [len(ranges)]))
    del graph.value_info[:]
    _drop_unused(graph)
    write_bytes_atomically(target, proto.SerializeToString())
    return _distinct([name for name, _, _ in ranges])


def _distinct(names: list[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    found = []
    for numbered in names:
        name = _NUMBER.sub("", numbered)
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(found)


def _range(onnx: Any, node: Any, constants: dict[str, Any]) -> tuple[float, float] | None:
    """Return the least and the largest value that a QuantizeLinear rounds without clipping; None: not one constant."""
    if len(node.input) < 3 or not set(node.input[1:]) <= set(constants):
        return None
    scale, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    if scale.size != 1 or zero.size != 1:
        return None
    limits = np.iinfo(zero.dtype)
    step, shift = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    return (limits.min - shift - 0.5) * step, (limits.max - shift + 0.5) * step


def _add_share(onnx: Any, graph: Any, place: int, tensor: str, low: float, high: float) -> str:
    """Append the nodes that compute a tensor's share, float32 [1]; return the name of the result."""
    prefix = f"{OUTPUT}/{place}"

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{prefix}/{kind}"
        graph.node.append(onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(what: str, value: Any) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{prefix}/{what}"))
        return f"{prefix}/{what}"

    clipped = add("Clip", [tensor, constant("low", np.float32(low)), constant("high", np.float32(high))])
    inside = add("Cast", [add("Equal", [clipped, tensor])], to=onnx.TensorProto.FLOAT)
    mean = add("ReduceMean", [add("Reshape", [inside, constant("flat", np.array([-1], np.int64))])], keepdims=1)
    return add("Sub", [constant("one", np.ones(1, np.float32)), mean])


def _drop_unused(graph: Any) -> None:
    """Remove nodes and constants that the outputs do not need."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)
