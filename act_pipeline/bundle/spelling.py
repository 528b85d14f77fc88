"""An exported ONNX file in the words that the parser of a TensorRT version knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.engines.tensorrt.targets import Version
from act_pipeline.onnx_export.validity import invalid_reason


def spell_for(path: Path, version: Version, where: str) -> None:
    """Rewrite an ONNX file for a version of TensorRT, in place.

    Args:
        path: the file.
        version: the version.
        where: path of the model, for messages.

    Raises:
        UserError: the file has an op that the version does not know.
    """
    import onnx

    proto = onnx.load(str(path))
    if "LayerNormalization" in version.lacks:
        _write_out_layer_norms(proto)
    unknown = sorted({node.op_type for node in proto.graph.node} & version.lacks)
    if unknown:
        newer = "; a newer TensorRT has it, on a newer device" if "GridSample" in unknown else ""
        raise UserError(
            f"{where} has {', '.join(unknown)}, which the ONNX parser of {version.title} does not know{newer}; take a "
            "model without it, such as a YOLO or PP-YOLOE"
        )
    if _opset(proto) > version.opset:
        _lower_opset(proto, version, where)
    else:
        onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def _opset(proto: Any) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain == "")


def _lower_opset(proto: Any, version: Version, where: str) -> None:
    """Declare an older opset: its ops are the same but for types and attributes, which the checker then looks at.

    Raises:
        UserError: an op is not in the older opset.
    """
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = version.opset
    reason = invalid_reason(proto)
    if reason is not None:
        raise UserError(
            f"{where} cannot be written in opset {version.opset}, the newest that {version.title} takes ({reason}); "
            "choose a newer TensorRT with --tensorrt"
        )


def _write_out_layer_norms(proto: Any) -> None:
    """Replace each LayerNormalization with the ops of its definition."""
    from onnx import helper, numpy_helper

    nodes = []
    ranks = _ranks(proto)
    for node in proto.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        source, scale = node.input[:2]
        axis = attributes.get("axis", -1)
        axes = list(range(axis, 0)) if axis < 0 else list(range(axis, ranks[source]))
        name = node.name or node.output[0]
        proto.graph.initializer.append(
            numpy_helper.from_array(np.array(attributes.get("epsilon", 1e-5), np.float32), f"{name}/epsilon")
        )

        def add(kind: str, inputs: list[str], output: str, **attrs: Any) -> str:
            nodes.append(helper.make_node(kind, inputs, [output], name=output, **attrs))  # noqa: B023
            return output

        mean = add("ReduceMean", [source], f"{name}/mean", axes=axes, keepdims=1)
        centred = add("Sub", [source, mean], f"{name}/centred")
        square = add("Mul", [centred, centred], f"{name}/square")
        variance = add("ReduceMean", [square], f"{name}/variance", axes=axes, keepdims=1)
        shifted = add("Add", [variance, f"{name}/epsilon"], f"{name}/shifted")
        deviation = add("Sqrt", [shifted], f"{name}/deviation")
        normal = add("Div", [centred, deviation], f"{name}/normal")
        has_bias = len(node.input) > 2 and node.input[2]
        scaled = add("Mul", [normal, scale], f"{name}/scaled" if has_bias else node.output[0])
        if has_bias:
            add("Add", [scaled, node.input[2]], node.output[0])
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _ranks(proto: Any) -> dict[str, int]:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto).graph
    return {value.name: len(value.type.tensor_type.shape.dim) for value in (*inferred.value_info, *inferred.input)}
