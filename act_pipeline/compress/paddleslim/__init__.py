"""Calls and patches of PaddleSlim's and Paddle's quantization passes."""
