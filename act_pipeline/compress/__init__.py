"""From a float model and a config to an INT8 model and its record, ``act.json``."""

from act_pipeline.compress.pipeline import Compressed, compress

__all__ = ["Compressed", "compress"]
