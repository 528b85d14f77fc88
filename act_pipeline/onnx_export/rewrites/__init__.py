"""Rewrites of the program or the ONNX graph that a runtime needs or that make it faster."""
