"""Quantization-aware training with distillation, based on PaddleSlim's ACT."""
