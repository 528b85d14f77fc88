"""Placement of Q/DQ for TensorRT: candidates are written here, timed by ``trtexec`` on the device, and decided here."""

from act_pipeline.compress.plan.on_device.decide import Outcome, read_study
from act_pipeline.compress.plan.on_device.write import StudyRequest, write_study

__all__ = ["Outcome", "StudyRequest", "read_study", "write_study"]
