"""How sensitive each op of a float model is to INT8, and what its tensors hold: ``tools/analyze.py``."""
