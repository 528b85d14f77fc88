"""Paddle's float ops as ONNX nodes: one function an op type."""
