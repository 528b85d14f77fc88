"""Masks of attention, ``(mask - 1) * 3.4e38``, hidden from OpenVINO's low-precision passes.

Where a model has Q/DQ anywhere, these passes (OpenVINO 2026.4) take a conversion, a subtraction and a multiplication
for the dequantization of an integer tensor, and move it past the addition that follows:
``scores + (mask - 1) * 3.4e38`` becomes ``((scores - 3.4e38) / 3.4e38 + mask) * 3.4e38``, in which the scores vanish.
A GroundingDINO with its text tower in INT8 and all else in float fell from 0.530 to 0.419 mAP. The passes do not see
through a maximum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LARGE = 1e9
_LOWEST = "lowest_float32"


def protect_masks(proto: Any) -> int:
    """Take the maximum with the lowest float32 of every product with a large constant; values do not change.

    Args:
        proto: the ModelProto, changed in place; its names are unique.

    Returns:
        Number of products.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    large = set()
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            if value.size and np.isfinite(value).all() and (np.abs(value) >= _LARGE).all():
                large.add(tensor.name)
    nodes, found = [], 0
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Mul" and large.intersection(node.input):
            found += 1
            result, node.output[0] = node.output[0], f"{node.output[0]}/unprotected"
            nodes.append(helper.make_node("Max", [node.output[0], _LOWEST], [result], name=f"{result}/protected"))
    if found:
        graph.initializer.append(numpy_helper.from_array(np.float32(np.finfo(np.float32).min).reshape(()), _LOWEST))
        del graph.node[:]
        graph.node.extend(nodes)
    return found
