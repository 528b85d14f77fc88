"""Paddle Inference: its own kernels, oneDNN, TensorRT, and the INT8 reference."""
