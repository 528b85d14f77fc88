"""A model evaluated, timed or shown in an engine: ``deploy/infer_eval.py``."""

from act_pipeline.inference.request import InferenceRequest
from act_pipeline.inference.run import InferenceOutcome, run_inference

__all__ = ["InferenceOutcome", "InferenceRequest", "run_inference"]
