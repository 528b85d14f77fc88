"""Runtimes that read ONNX files: OpenVINO and ONNX Runtime."""
