"""TensorRT's plugin ``EfficientNMS_TRT``, version 1, as NVIDIA publishes it: what a node has to be for its parser.

From NVIDIA/TensorRT, plugin/efficientNMSPlugin (EfficientNMSPlugin_PluginConfig.yaml; ``createPlugin``,
``supportsFormatCombination``, ``configurePlugin`` and ``getOutputDimensions`` of efficientNMSPlugin.cpp), and
onnx/onnx-tensorrt, ``FallbackPluginImporter`` and ``loadFields`` of onnxOpImporters.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx

PLUGIN = "EfficientNMS_TRT"
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


class _Attribute(NamedTuple):
    """ONNX type of an attribute, whether it is required, and what ``createPlugin`` validates."""

    kind: int
    required: bool
    valid: Callable[[Any], bool]


def _int32(value: int) -> bool:
    return -(2**31) <= value < 2**31


ATTRIBUTES = {
    "score_threshold": _Attribute(onnx.AttributeProto.FLOAT, True, lambda value: value >= 0),
    "iou_threshold": _Attribute(onnx.AttributeProto.FLOAT, True, lambda value: value > 0),
    "max_output_boxes": _Attribute(onnx.AttributeProto.INT, True, lambda value: value > 0 and _int32(value)),
    "background_class": _Attribute(onnx.AttributeProto.INT, True, _int32),
    "score_activation": _Attribute(onnx.AttributeProto.INT, True, lambda value: value in (0, 1)),
    "class_agnostic": _Attribute(onnx.AttributeProto.INT, False, lambda value: value in (0, 1)),
    "box_coding": _Attribute(onnx.AttributeProto.INT, True, lambda value: value in (0, 1)),
    # Of the parser, not of the plugin.
    "plugin_version": _Attribute(onnx.AttributeProto.STRING, False, lambda value: value == b"1"),
    "plugin_namespace": _Attribute(onnx.AttributeProto.STRING, False, lambda value: value == b""),
}


def plugin_problems(proto: onnx.ModelProto) -> list[str]:
    """Return why TensorRT would refuse the only node of the plugin, and how its outputs differ from the file's."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    known = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input)}
    (node,) = (node for node in proto.graph.node if node.op_type == PLUGIN)
    problems = _attribute_problems(node)
    if len(node.input) not in (2, 3) or len(node.output) != 4:
        return [*problems, f"{len(node.input)} inputs and {len(node.output)} outputs"]
    boxes, scores = ([_size(dim) for dim in known[name].shape.dim] for name in node.input[:2])
    kinds = {known[name].elem_type for name in node.input}
    if len(kinds) != 1 or not kinds <= set(_FLOATS):
        problems.append(f"types of the inputs {kinds}")
    if len(scores) != 3 and scores[3:] != [1]:
        problems.append(f"scores {scores}")
    if not (len(boxes) == 3 or (len(boxes) == 4 and boxes[2] in (1, scores[2]))) or boxes[-1] != 4:
        problems.append(f"boxes {boxes}")
    if boxes[:2] != scores[:2]:
        problems.append(f"boxes {boxes} of scores {scores}")
    batch, most = boxes[0], next(item.i for item in node.attribute if item.name == "max_output_boxes")
    shapes = [[batch, 1], [batch, most, 4], [batch, most], [batch, most]]
    types = [onnx.TensorProto.INT32, min(kinds), min(kinds), onnx.TensorProto.INT32]
    for name, shape, kind in zip(node.output, shapes, types):
        stated = _output_of(proto, name)
        found = [_size(dim) for dim in stated.shape.dim]
        if found != shape or stated.elem_type != kind:
            problems.append(f"output {found} of type {stated.elem_type}, expected {shape} of type {kind}")
    return problems


def _attribute_problems(node: onnx.NodeProto) -> list[str]:
    found = {item.name: item for item in node.attribute}
    problems = [f"{name} is missing" for name, what in ATTRIBUTES.items() if what.required and name not in found]
    for name, item in found.items():
        what = ATTRIBUTES.get(name)
        if what is None:
            problems.append(f"{name} is no attribute")
        elif item.type != what.kind or not what.valid(onnx.helper.get_attribute_value(item)):
            problems.append(f"{name} is {onnx.helper.get_attribute_value(item)!r} of type {item.type}")
    return problems


def _output_of(proto: onnx.ModelProto, name: str) -> onnx.TypeProto.Tensor:
    """Return the described output of the file that is an output of the node, by Identity."""
    (copy,) = (node for node in proto.graph.node if name in node.input)
    assert copy.op_type == "Identity"
    return next(value.type.tensor_type for value in proto.graph.output if value.name == copy.output[0])


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    """Return a size; ``N`` for one that is open, whatever shape inference calls it: that of the batch."""
    return dim.dim_value if dim.HasField("dim_value") else "N"
