"""Rewrites of the program before it becomes ONNX, each for what a runtime computes faster or at all."""
