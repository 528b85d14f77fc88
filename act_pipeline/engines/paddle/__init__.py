"""Engines on Paddle Inference: Paddle's own kernels, oneDNN, TensorRT, and the INT8 reference."""
