"""The runtimes that a file is written for."""

from __future__ import annotations

# Type of quantized activations by target; the thresholds are the same. OpenVINO loses 0.05 mAP on int8 activations and
# none on uint8 with zero point 128, which is the same arithmetic; some tensors have another zero point there
# (rewrites.zero_points). TensorRT accepts only int8 with zero point 0. So does TensorRT-RTX, but its plans are smaller
# where all activations are rounded with scale 1: GraphBuilder.unit_scales (not with FP16, whose range is too small for
# the weights' scales then).
TARGETS = {"tensorrt": "int8", "tensorrt_rtx": "int8", "cpu": "uint8", "onnxruntime": "uint8"}
# Those that run on a CPU.
CPU_TARGETS = ("cpu", "onnxruntime")
# What to call them.
RUNTIMES = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "cpu": "OpenVINO and ONNX Runtime",
    "onnxruntime": "ONNX Runtime",
}
