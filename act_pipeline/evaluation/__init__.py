"""COCO scores, latency and throughput of an engine on a data set, and comparisons of two models."""

from act_pipeline.evaluation.agreement import Agreement, agreement, detection_change
from act_pipeline.evaluation.coco import STAT_NAMES, GroundTruth
from act_pipeline.evaluation.comparison import (
    AgreementInterval,
    Comparison,
    ComparisonFigures,
    compare,
    compare_on_some,
    compare_with_kept,
)
from act_pipeline.evaluation.confidence import AgreementLoss, MapDifference, agreement_loss, map_difference
from act_pipeline.evaluation.detections_file import (
    DETECTIONS_FILENAME,
    KEPT_DETECTIONS,
    Detections,
    best_detections,
    load_detections,
    save_detections,
)
from act_pipeline.evaluation.result import EVAL_SCHEMA, Evaluation, engine_record
from act_pipeline.evaluation.runner import EvaluationReader, evaluate, evaluate_in_parallel, score

__all__ = [
    "DETECTIONS_FILENAME",
    "EVAL_SCHEMA",
    "KEPT_DETECTIONS",
    "STAT_NAMES",
    "Agreement",
    "AgreementInterval",
    "AgreementLoss",
    "Comparison",
    "ComparisonFigures",
    "Detections",
    "Evaluation",
    "EvaluationReader",
    "GroundTruth",
    "MapDifference",
    "agreement",
    "agreement_loss",
    "best_detections",
    "compare",
    "compare_on_some",
    "compare_with_kept",
    "detection_change",
    "engine_record",
    "evaluate",
    "evaluate_in_parallel",
    "load_detections",
    "map_difference",
    "save_detections",
    "score",
]
