"""What a float model computes on calibration images: statistics of tensors, gathered in one pass."""

from act_pipeline.calibration.collector import collect, quantizable_tensors
from act_pipeline.calibration.observers import AbsHistogram, AbsMax, ChannelMean, Observer

__all__ = ["AbsHistogram", "AbsMax", "ChannelMean", "Observer", "collect", "quantizable_tensors"]
