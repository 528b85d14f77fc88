"""From ACT's INT8 model, or a float one, to ONNX with Q/DQ spelled as TensorRT, OpenVINO and ONNX Runtime want it."""

from act_pipeline.onnx_export.cache import lowered_onnx, writable_directory
from act_pipeline.onnx_export.export import TARGETS, Lowered, lower

__all__ = ["TARGETS", "Lowered", "lower", "lowered_onnx", "writable_directory"]
