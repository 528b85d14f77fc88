"""Compress a float model, as a config specifies, to an INT8 model and its record, ``act.json``."""

from act_pipeline.compress.pipeline import Compressed, compress

__all__ = ["Compressed", "compress"]
