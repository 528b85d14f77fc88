"""Sensitivity of each op of a float model to INT8, and statistics of its tensors: ``tools/analyze.py``."""
