"""Statistics of a float model's tensors, gathered in one pass over the calibration images."""

from act_pipeline.calibration.collector import collect, quantizable_tensors
from act_pipeline.calibration.observers import AbsHistogram, AbsMax, ChannelMean, Divided, Observer

__all__ = ["AbsHistogram", "AbsMax", "ChannelMean", "Divided", "Observer", "collect", "quantizable_tensors"]
