"""Large float constants of INT8 files stored in FP16, each followed by a Cast to float32.

Beside INT8 weights, positions, masks, relative position biases and the weights of ops left in float are what a file
consists of: with a frozen prompt 3.6 of the 10.3 MB of a GroundingDINO. Runtimes fold the Cast when they load the file,
so that they compute in float32 as before. FP16 has 11 significant bits, INT8 has 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from act_pipeline.onnx_export.rewrites.float16 import QUANTIZATION_OPS

# A Cast takes about 100 bytes of a file.
_SMALLEST = 512
# Half of the last of the 11 bits, relative to the largest value of a tensor.
_LARGEST_ERROR = 2.0**-11


def store_constants_in_float16(proto: Any) -> int:
    """Store large float32 constants in FP16, with a Cast to float32 after each.

    Scales stay in float32, and so do constants that FP16 cannot hold: infinities, values above 65504, and tensors whose
    largest value is so small that rounding to FP16 loses more than 2^-11 of it.

    Args:
        proto: an ``onnx.ModelProto``, changed in place.

    Returns:
        Number of constants stored in FP16.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    scales = {name for node in graph.node if node.op_type in QUANTIZATION_OPS for name in node.input[1:]}
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in scales:
            continue
        value = numpy_helper.to_array(tensor)
        if value.size < _SMALLEST or not _fits(value):
            continue
        name, stored = tensor.name, f"{tensor.name}/fp16"
        assert stored not in names
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], name=name, to=TensorProto.FLOAT))
    if casts:
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
    return len(casts)


def _fits(value: np.ndarray) -> bool:
    """Return whether FP16 holds a tensor to 2^-11 of its largest value."""
    largest = np.abs(value).max()
    if not np.isfinite(value).all() or largest > np.finfo(np.float16).max:
        return False
    error = np.abs(value.astype(np.float16).astype(np.float32) - value).max()
    return bool(error <= largest * _LARGEST_ERROR)
