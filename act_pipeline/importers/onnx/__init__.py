"""ONNX files into Paddle programs."""
