"""TensorRT and TensorRT-RTX, by their Python modules."""
