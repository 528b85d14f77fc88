"""Accuracy control: revert ops to float until the INT8 model is within ``Strategy.max_drop``."""
