"""The engine that evaluates a compression, and the checks and the evaluation of the float model."""
