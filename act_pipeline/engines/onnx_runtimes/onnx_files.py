"""The ONNX file that a runtime loads: lowered from a model's folder or given, and looked into before a runtime does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.arrays import require_outputs
from act_pipeline.engines.interface import Artifact

_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
# How activations are rounded -> the --target of deploy/export_onnx.py that writes them so.
_QDQ_FORMATS = {"int8": "tensorrt", "uint8": "cpu"}


@dataclass(frozen=True)
class OnnxSummary:
    """What an ONNX file takes, gives and is made of.

    Attributes:
        inputs: name -> shape, -1 where any size goes.
        outputs: names.
        output_shapes: name -> shape of these, -1 where any size goes.
        op_counts: op type -> how many.
        rounded_to: type that activations are rounded to, ``int8`` or ``uint8``; None for a float file.
        symmetric: each of them has one scale, and the zero point 0 of ``int8`` or 128 of ``uint8``.
        float16: it holds FP16 constants.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    op_counts: Mapping[str, int]
    rounded_to: str | None = None
    symmetric: bool = True
    float16: bool = False
    output_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """The file holds Q/DQ pairs or integer ops: it is an INT8 model."""
        return any(op in self.op_counts for op in _INTEGER_OPS)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width that the network takes, pixels; None if any."""
        shape = self.inputs.get("image", ())
        return (shape[2], shape[3]) if len(shape) == 4 and shape[2] > 0 and shape[3] > 0 else None


def inspect_onnx(model: OnnxModel) -> OnnxSummary:
    """Read the file.

    Raises:
        UserError: it is truncated or no ONNX file, or lacks an output; or ``onnx`` is missing.
    """
    from google.protobuf.message import DecodeError

    from act_pipeline.onnx_export.graph_builder import require_onnx

    onnx = require_onnx()
    damaged = UserError(
        f"{model.path} is truncated or no ONNX file ({model.bytes} bytes); write it again with deploy/export_onnx.py"
    )
    try:
        graph = onnx.load(str(model.path), load_external_data=False).graph
    except (DecodeError, ValueError):
        raise damaged from None
    if not graph.node:
        raise damaged
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # paddle2onnx writes Constant nodes instead.
    values = [node for node in graph.node if node.op_type == "Constant" and node.attribute and node.output]
    constants.update({node.output[0]: node.attribute[0].t for node in values if node.attribute[0].name == "value"})
    try:
        rounded_to, symmetric = _rounding(onnx, graph, constants)
    except Exception:  # onnx raises whatever comes up when a constant's type, shape and bytes contradict each other
        raise damaged from None
    summary = OnnxSummary(
        inputs={value.name: _shape(value) for value in graph.input if value.name not in constants},
        outputs=tuple(value.name for value in graph.output),
        op_counts=Counter(node.op_type for node in graph.node),
        rounded_to=rounded_to,
        symmetric=symmetric,
        float16=any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in constants.values()),
        output_shapes={value.name: _shape(value) for value in graph.output},
    )
    require_outputs(summary.output_shapes, model.path)
    return summary


def onnx_artifact(model: Artifact, target: str = "cpu", float16: bool = False) -> tuple[OnnxModel, OnnxSummary]:
    """Return the file for a runtime and what it holds: a folder is lowered, a file is taken as it is.

    Args:
        model: a model's folder, or an ONNX file.
        target: how a folder is spelled, a key of :data:`act_pipeline.onnx_export.TARGETS`.
        float16: float work in FP16; a float file must have it, or must not, accordingly.

    Raises:
        UserError: as the lowering; or the file's floats are of another type.
    """
    if isinstance(model, InferenceModel):
        from act_pipeline.onnx_export import lowered_onnx

        model = lowered_onnx(model, target, float16=float16)
    summary = inspect_onnx(model)
    if not summary.quantized and summary.float16 != float16:
        found, asked = ("FP16", "FP32") if summary.float16 else ("FP32", "FP16")
        how = "with" if float16 else "without"
        raise UserError(
            f"{model.path} holds {found} weights, asked for {asked}; write it {how} --float16 (deploy/export_onnx.py), "
            "or give the model's folder"
        )
    return model, summary


def require_qdq_format(model: OnnxModel, summary: OnnxSummary, target: str, why: str) -> None:
    """Raise a UserError unless an INT8 file is spelled for ``target``; ``why`` says what happens otherwise."""
    found = _QDQ_FORMATS.get(summary.rounded_to or "")
    if found is not None and found != target:
        zero_points = {"tensorrt": "int8 activations, zero point 0", "cpu": "uint8 activations, zero point 128"}
        raise UserError(
            f"{model.path} is spelled for --target {found} ({zero_points[found]}), {why}; write it with "
            f"deploy/export_onnx.py --target {target}, or give the model's folder"
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(
        size.dim_value if size.WhichOneof("value") == "dim_value" and size.dim_value > 0 else -1
        for size in value.type.tensor_type.shape.dim
    )


def _rounding(onnx: Any, graph: Any, constants: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the type that activations are rounded to, and whether around zero with one scale each.

    A QuantizeLinear rounds to the type of its zero point; without one to uint8 (or ``output_dtype``, opset 21).
    """
    kinds, symmetric = set(), True
    middle = {onnx.TensorProto.INT8: 0, onnx.TensorProto.UINT8: 128}
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        named = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        kind = zero_point.data_type if zero_point is not None else named or onnx.TensorProto.UINT8
        if zero_point is not None and zero_point.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("a zero point in another file, which nobody writes and nothing here opens")
        value = onnx.numpy_helper.to_array(zero_point).reshape(-1) if zero_point is not None else [0]
        kinds.add(kind)
        symmetric = symmetric and len(value) == 1 and middle.get(kind) == value[0]
    if onnx.TensorProto.INT8 in kinds:  # one such pair is enough to be computed wrong
        return "int8", symmetric
    return "uint8" if onnx.TensorProto.UINT8 in kinds else None, symmetric
