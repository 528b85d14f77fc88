"""Conversion of float ops to FP16, for GPUs: everything up to the last matmul; later ops stay FP32."""

from __future__ import annotations

from typing import Any

import numpy as np

# QuantizeLinear and DequantizeLinear support FP16 scales from this opset on.
QUANTIZED_OPSET = 19
# Ops that the specification has no FP16 for before opset 20, or that ONNX Runtime sums in FP32 only on the CPU.
_SINGLE = ("Celu", "IsInf", "ScatterElements", "ScatterND")
QUANTIZATION_OPS = ("QuantizeLinear", "DequantizeLinear")
_COMPUTING = ("Conv", "ConvTranspose", "MatMul")


def to_float16(proto: Any) -> None:
    """Convert weights, scales and float tensors of an ONNX model to FP16; inputs and outputs keep their types.

    The nodes after the last convolution or matmul (scores, boxes in pixels, top-k) stay FP32: FP16 has 11 significant
    bits, so a coordinate of 1,000 pixels would be rounded to half a pixel.

    Args:
        proto: an ``onnx.ModelProto``, changed in place.
    """
    import onnx

    graph = proto.graph
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types.update({name: tensor.data_type for name, tensor in constants.items()})
    scales = {node.input[1] for node in graph.node if node.op_type in QUANTIZATION_OPS}
    kept = _after_the_last_matmul(graph)
    is_half: dict[str, bool] = {}
    nodes, casts = [], {}

    def as_type(name: str, wanted: int) -> str:
        """Return the name of the tensor in the wanted float type; add a Cast or an initializer if needed."""
        if types.get(name) != single or (wanted == half) == is_half.get(name, False):
            return name
        key = (name, wanted)
        if key not in casts:
            casts[key] = f"{name}/{'fp16' if wanted == half else 'fp32'}"
            if name in constants:
                limit = np.finfo(np.float16).max
                value = onnx.numpy_helper.to_array(constants[name])
                if name in scales:  # a scale must not underflow to zero
                    value = np.maximum(value, np.finfo(np.float16).smallest_subnormal)
                value = np.where(np.isinf(value), value, np.clip(value, -limit, limit)).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(value, casts[key]))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [casts[key]], name=casts[key], to=wanted))
        return casts[key]

    for node in graph.node:
        wanted = single if node.name in kept or node.op_type in _SINGLE else half
        for index, name in enumerate(node.input):
            is_scale = node.op_type == "Resize" and index > 0  # the ONNX specification requires FP32 scales
            node.input[index] = as_type(name, single if is_scale else wanted)
        if wanted == half:
            for name in node.output:
                is_half[name] = types.get(name) == single
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == single:
                    attribute.i = half
                elif node.op_type == "ConstantOfShape" and attribute.t.data_type == single:
                    value = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
                    attribute.t.CopyFrom(onnx.numpy_helper.from_array(value))
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    remaining = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(remaining)


def _after_the_last_matmul(graph: Any) -> set[str]:
    """Return the names of the nodes on whose outputs no convolution or matmul depends."""
    reaching: set[str] = set()  # tensors
    kept = set()
    for node in reversed(graph.node):
        if node.op_type in _COMPUTING or reaching & set(node.output):
            reaching.update(node.input)
        else:
            kept.add(node.name)
    return kept
