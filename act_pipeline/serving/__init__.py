"""Versions of a model in service: promotion, canary, shadow, metrics, rules that roll back. The server is not here."""

from act_pipeline.serving.monitor import Monitor
from act_pipeline.serving.promotion import promote, roll_back
from act_pipeline.serving.ranges import RangeShares
from act_pipeline.serving.repository import Repository
from act_pipeline.serving.rules import Rules, load_rules
from act_pipeline.serving.state import SHARES, State
from act_pipeline.serving.temperature import Temperature
from act_pipeline.serving.version import Version

__all__ = [
    "SHARES",
    "Monitor",
    "RangeShares",
    "Repository",
    "Rules",
    "State",
    "Temperature",
    "Version",
    "load_rules",
    "promote",
    "roll_back",
]
