"""Evaluation, timing or visualization of a model in an engine: ``deploy/infer_eval.py``."""

from act_pipeline.inference.outcome import InferenceOutcome
from act_pipeline.inference.request import InferenceRequest
from act_pipeline.inference.run import run_inference

__all__ = ["InferenceOutcome", "InferenceRequest", "run_inference"]
