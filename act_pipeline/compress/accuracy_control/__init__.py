"""Accuracy control: revert ops to float until the INT8 model is within the limits; take back what floats by default."""
