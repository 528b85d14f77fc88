"""The targets, by name."""

from __future__ import annotations

from tests.fuzz.harness import Target
from tests.fuzz.targets.annotations import ANNOTATIONS
from tests.fuzz.targets.checkpoint import CHECKPOINT
from tests.fuzz.targets.config import CONFIG
from tests.fuzz.targets.detections import DETECTIONS
from tests.fuzz.targets.device_placement import DEVICE_PLACEMENT
from tests.fuzz.targets.download import DOWNLOAD
from tests.fuzz.targets.infer_cfg import INFER_CFG
from tests.fuzz.targets.inference_yml import INFERENCE_YML
from tests.fuzz.targets.label_list import LABEL_LIST
from tests.fuzz.targets.onnx_file import ONNX_FILE
from tests.fuzz.targets.onnx_import import ONNX_IMPORT
from tests.fuzz.targets.paddle_model import PADDLE_MODEL
from tests.fuzz.targets.reader import READER
from tests.fuzz.targets.records import RECORDS
from tests.fuzz.targets.serving import AUDIT, COUNTERS, POINTER, RULES, VERSION
from tests.fuzz.targets.shapes import SHAPES

_ALL = (
    CONFIG,
    READER,
    ANNOTATIONS,
    RECORDS,
    DETECTIONS,
    CHECKPOINT,
    DEVICE_PLACEMENT,
    SHAPES,
    INFER_CFG,
    INFERENCE_YML,
    LABEL_LIST,
    ONNX_FILE,
    ONNX_IMPORT,
    PADDLE_MODEL,
    DOWNLOAD,
    POINTER,
    VERSION,
    COUNTERS,
    AUDIT,
    RULES,
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
