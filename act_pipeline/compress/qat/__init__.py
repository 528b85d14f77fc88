"""Quantization-aware training with distillation, as PaddleSlim's ACT does it."""
