"""Export of INT8 and float Paddle models to ONNX, in the Q/DQ format of TensorRT, OpenVINO and ONNX Runtime."""

from act_pipeline.onnx_export.cache import lowered_onnx, writable_directory
from act_pipeline.onnx_export.export import Lowered, lower
from act_pipeline.onnx_export.targets import TARGETS

__all__ = ["TARGETS", "Lowered", "lower", "lowered_onnx", "writable_directory"]
