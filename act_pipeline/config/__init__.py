"""Read a YAML file in PaddleSlim's schema into a checked, typed :class:`Config`."""

from act_pipeline.config.compression import Config, load_config
from act_pipeline.config.sections import Quantize, QuantPost, SmoothQuant

__all__ = ["Config", "QuantPost", "Quantize", "SmoothQuant", "load_config"]
