"""Read a YAML file in PaddleSlim's schema into a checked, typed :class:`Config`."""

from act_pipeline.config.compression import Config, Quantize, QuantPost, SmoothQuant, load_config

__all__ = ["Config", "QuantPost", "Quantize", "SmoothQuant", "load_config"]
