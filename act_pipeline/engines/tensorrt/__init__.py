"""Engines on TensorRT and TensorRT-RTX, through NVIDIA's Python modules."""
