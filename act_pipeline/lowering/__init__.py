"""From ACT's INT8 model, or a float one, to ONNX with Q/DQ spelled as TensorRT, OpenVINO and ONNX Runtime want it."""

from act_pipeline.lowering.cache import lowered_onnx, writable_directory
from act_pipeline.lowering.lower import TARGETS, Lowered, lower

__all__ = ["TARGETS", "Lowered", "lower", "lowered_onnx", "writable_directory"]
