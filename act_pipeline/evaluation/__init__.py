"""COCO scores, latency and throughput of an engine on a data set, and how sure a difference of two models is."""

from act_pipeline.evaluation.agreement import Agreement, agreement, detection_change
from act_pipeline.evaluation.coco import STAT_NAMES, GroundTruth
from act_pipeline.evaluation.detections_file import (
    DETECTIONS_FILENAME,
    KEPT_DETECTIONS,
    best_detections,
    load_detections,
    save_detections,
)
from act_pipeline.evaluation.result import EVAL_SCHEMA, Evaluation, engine_record
from act_pipeline.evaluation.runner import EvaluationReader, evaluate, evaluate_beside, score

__all__ = [
    "DETECTIONS_FILENAME",
    "EVAL_SCHEMA",
    "KEPT_DETECTIONS",
    "STAT_NAMES",
    "Agreement",
    "Evaluation",
    "EvaluationReader",
    "GroundTruth",
    "agreement",
    "best_detections",
    "detection_change",
    "engine_record",
    "evaluate",
    "evaluate_beside",
    "load_detections",
    "save_detections",
    "score",
]
