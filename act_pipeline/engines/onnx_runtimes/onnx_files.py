"""The ONNX file that a runtime loads, exported from a model folder or given by the user; checks before loading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_pipeline.core.artifacts import Artifact, InferenceModel, OnnxModel, PlanModel
from act_pipeline.core.errors import UserError
from act_pipeline.families.registry import Decoder, decoder_of, family_of_file

_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
# Type of rounded activations -> the --target of deploy/export_onnx.py that writes this type.
_QDQ_FORMATS = {"int8": "tensorrt", "uint8": "cpu"}


@dataclass(frozen=True)
class OnnxSummary:
    """Inputs, outputs, ops and Q/DQ format of an ONNX file.

    Attributes:
        inputs: name -> shape, -1 for a dynamic dimension.
        outputs: names in the order of the graph.
        output_shapes: output name -> shape, -1 for a dynamic dimension.
        op_counts: op type -> number of nodes.
        rounded_to: type that activations are rounded to, ``int8`` or ``uint8``; None for a float file.
        per_tensor: whether each rounded activation has a single zero point.
        float16: whether the file holds FP16 constants.
        decoder: turns its outputs into detections, where the file states how; None: it does not.
        input_dtypes: input name -> dtype, such as ``float32`` and ``int64``.
    """

    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    op_counts: Mapping[str, int]
    rounded_to: str | None = None
    per_tensor: bool = True
    float16: bool = False
    output_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    decoder: Decoder | None = None
    input_dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether the file holds Q/DQ pairs or integer ops, that is, is an INT8 model."""
        return any(op in self.op_counts for op in _INTEGER_OPS)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the network's input in pixels; None if they are dynamic."""
        shape = self.inputs.get("image", ())
        return (shape[2], shape[3]) if len(shape) == 4 and shape[2] > 0 and shape[3] > 0 else None


def inspect_onnx(model: OnnxModel) -> OnnxSummary:
    """Return a summary of an ONNX file.

    Args:
        model: the file; external data is not read.

    Raises:
        UserError: the file is truncated, is not ONNX or lacks an output of a detector, or ``onnx`` is not installed.
    """
    from google.protobuf.message import DecodeError

    from act_pipeline.onnx_export.graph_builder import require_onnx

    onnx = require_onnx()
    damaged = UserError(
        f"{model.path} is truncated or no ONNX file ({model.bytes} bytes); write it again with deploy/export_onnx.py"
    )
    try:
        proto = onnx.load(str(model.path), load_external_data=False)
    except (DecodeError, ValueError):
        raise damaged from None
    graph = proto.graph
    if not graph.node:
        raise damaged
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # paddle2onnx writes Constant nodes instead.
    values = [node for node in graph.node if node.op_type == "Constant" and node.attribute and node.output]
    constants.update({node.output[0]: node.attribute[0].t for node in values if node.attribute[0].name == "value"})
    try:
        rounded_to, per_tensor = _rounding(onnx, graph, constants)
    except Exception:  # onnx raises exceptions of many types when a constant's type, shape and bytes do not match
        raise damaged from None
    summary = OnnxSummary(
        inputs={value.name: _shape(value) for value in graph.input if value.name not in constants},
        outputs=tuple(value.name for value in graph.output),
        op_counts=Counter(node.op_type for node in graph.node),
        rounded_to=rounded_to,
        per_tensor=per_tensor,
        float16=any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in constants.values()),
        output_shapes={value.name: _shape(value) for value in graph.output},
        decoder=_stated_decoder(proto, model),
        input_dtypes={value.name: _dtype(onnx, value) for value in graph.input if value.name not in constants},
    )
    if summary.decoder is None:
        decoder_of(model, summary.output_shapes)
    return summary


def decoder_of_file(model: Artifact, summary: OnnxSummary, decoder: Decoder | None = None) -> Decoder:
    """Return what turns the outputs of an ONNX file into detections.

    Args:
        model: the file, or the folder it was exported from.
        summary: the file's summary. What the file states comes first: its outputs may be another stage of the
            post-process than those of the folder's model.
        decoder: the caller's; None: chosen by the model's description and outputs.

    Raises:
        UserError: the outputs are not those of a detector.
    """
    return summary.decoder or decoder or decoder_of(model, summary.output_shapes)


def _stated_decoder(proto: Any, model: OnnxModel) -> Decoder | None:
    from act_pipeline.onnx_export.nms_cut import METADATA_KEY, decoder_metadata

    text = next((entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY), None)
    stated = decoder_metadata(text) if text is not None else None
    family = family_of_file(stated[0]) if stated is not None else None
    return Decoder(family, stated[1], model.path) if stated is not None and family is not None else None


def onnx_artifact(model: Artifact, target: str = "cpu", float16: bool = False) -> tuple[OnnxModel, OnnxSummary]:
    """Return the ONNX file for a runtime and its summary: a folder is exported, a file is used unchanged.

    Args:
        model: a Paddle model folder, or an ONNX file.
        target: Q/DQ format for a folder, a key of :data:`act_pipeline.onnx_export.TARGETS`.
        float16: compute in FP16 what is not INT8. A float ONNX file must be FP16 if set, FP32 otherwise.

    Raises:
        UserError: the export to ONNX fails, the file's float type is not the requested one, or it is a plan.
    """
    if isinstance(model, PlanModel):
        raise UserError(f"{model.path} is a TensorRT plan, expected a model folder or an ONNX file")
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
    """Check the Q/DQ format of an INT8 file; a float file passes.

    Args:
        model: the ONNX file, for the message.
        summary: its summary.
        target: the required Q/DQ format, ``cpu`` (uint8 activations) or ``tensorrt`` (int8 activations).
        why: what happens with the other format, for the message.

    Raises:
        UserError: the file has the other format.
    """
    found = _QDQ_FORMATS.get(summary.rounded_to or "")
    if found is not None and found != target:
        zero_points = {"tensorrt": "int8 activations, zero point 0", "cpu": "uint8 activations"}
        raise UserError(
            f"{model.path} has the Q/DQ of --target {found} ({zero_points[found]}), {why}; write it with "
            f"deploy/export_onnx.py --target {target}, or give the model's folder"
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(
        size.dim_value if size.WhichOneof("value") == "dim_value" and size.dim_value > 0 else -1
        for size in value.type.tensor_type.shape.dim
    )


def _dtype(onnx: Any, value: Any) -> str:
    kind = value.type.tensor_type.elem_type
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(kind))
    except KeyError:  # a damaged file, which the runtime will refuse
        return "float32"


def _rounding(onnx: Any, graph: Any, constants: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the type that activations are rounded to, and whether each has one zero point.

    A QuantizeLinear rounds to the type of its zero point; without one to uint8 (or ``output_dtype``, opset 21).
    """
    kinds, per_tensor = set(), True
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
        per_tensor = per_tensor and len(value) == 1
    if onnx.TensorProto.INT8 in kinds:  # a single int8 pair makes the file unfit for the other target
        return "int8", per_tensor
    return "uint8" if onnx.TensorProto.UINT8 in kinds else None, per_tensor
