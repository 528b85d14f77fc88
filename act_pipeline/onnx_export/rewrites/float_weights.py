"""INT8 weights of ops with float activations, written in float.

In files for TensorRT only: it is documented to take a DequantizeLinear on a weight where the other input of the
convolution or matmul has a Q/DQ pair too.
"""

from __future__ import annotations

import numpy as np

from act_pipeline.onnx_export.program import INT8_OPS, QuantizedTensor, Source


def write_weights_in_float(source: Source) -> int:
    """Give ops with float activations and INT8 weights the dequantized weights; their results do not change.

    Args:
        source: the program, changed in place.

    Returns:
        Number of ops changed.
    """
    changed = 0
    for op in source.ops:
        if op.type not in INT8_OPS:
            continue
        activation, slot = op.operands
        if op.input(activation) in source.quantized:
            continue
        name = op.input(slot)
        tensor = source.quantized.get(name)
        if tensor is None or tensor.weight is None:
            continue
        stored = f"{name}.float"
        if stored not in source.constants:
            source.constants[stored] = _dequantized(tensor)
            source.shapes[stored], source.dtypes[stored] = source.shapes[name], np.float32
        op.inputs[slot] = [stored]
        changed += 1
    return changed


def _dequantized(tensor: QuantizedTensor) -> np.ndarray:
    assert tensor.weight is not None
    scale = tensor.scale
    if scale.ndim:
        shape = [1] * tensor.weight.ndim
        shape[tensor.axis] = -1
        scale = scale.reshape(shape)
    return tensor.weight.astype(np.float32) * scale
