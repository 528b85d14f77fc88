"""PaddleDetection's own PP-YOLOE and PP-YOLOE+: what their export needs besides `ppdet`'s modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from act_pipeline.core.errors import UserError

# Architecture of paddledet 2.6 -> `arch` of infer_cfg.yml, as in ppdet/engine/export_utils.py.
_ARCHS = {"YOLOv3": "YOLO", "PPYOLOE": "PPYOLOE", "PPYOLOEWithAuxHead": "PPYOLOE"}
_HEAD = "PPYOLOEHead"
_MIN_SUBGRAPH_SIZE = 3
_NMS_KEYS = (
    "name", "nms_top_k", "keep_top_k", "score_threshold", "nms_threshold", "normalized", "background_label"
)  # fmt: skip
EXPORTABLE = "DETR with RTDETRTransformer, or YOLOv3, PPYOLOE or PPYOLOEWithAuxHead with PPYOLOEHead"


def is_ppyoloe(content: Mapping[str, Any]) -> bool:
    """Return whether a config is one of a PP-YOLOE: its head is ``PPYOLOEHead``.

    Args:
        content: content of a model YAML.
    """
    architecture = content.get("architecture")
    section = content.get(architecture) if isinstance(architecture, str) else None
    return architecture in _ARCHS and isinstance(section, Mapping) and section.get("yolo_head") == _HEAD


def check_ppyoloe(source: str, content: Mapping[str, Any]) -> None:
    """Check what can be checked of a config without building the model.

    Args:
        source: the config, for messages.
        content: its content.

    Raises:
        UserError: a section is no mapping, the NMS is another than ``MultiClassNMS``, or there are no preprocessing
            steps.
    """
    section = content.get(_HEAD) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"{source}: key '{_HEAD}' is {section!r}, expected 'key: value' lines; delete it for defaults")
    nms = section.get("nms", "MultiClassNMS")
    name = nms.get("name", "MultiClassNMS") if isinstance(nms, Mapping) else nms
    if name != "MultiClassNMS" and not content.get("exclude_nms"):
        raise UserError(
            f"{source}: key '{_HEAD}.nms' is {name!r}, expected MultiClassNMS; set it, or export with exclude_nms=True"
        )
    if not any(_reader_steps(content, reader) for reader in ("TestReader", "EvalReader")):
        raise UserError(
            f"{source}: TestReader.sample_transforms is missing, which infer_cfg.yml needs; add the _BASE_ of the "
            "reader, such as ppyoloe_plus_reader.yml"
        )


def infer_cfg_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``infer_cfg.yml`` that depend on the detector: ``arch``, ``min_subgraph_size``, ``NMS``.

    ``NMS`` holds the thresholds of the config, as PaddleDetection writes them for PicoDet: whoever runs a model without
    NMS in the graph reads them.

    Args:
        content: content of the model YAML.
    """
    nms = (content.get(_HEAD) or {}).get("nms")
    given = dict(nms) if isinstance(nms, Mapping) else {}
    # The defaults of ppdet.modeling.layers.MultiClassNMS.
    defaults = {"name": "MultiClassNMS", "nms_top_k": -1, "keep_top_k": 100, "score_threshold": 0.05}
    section = {**defaults, "nms_threshold": 0.5, **{key: given[key] for key in _NMS_KEYS if key in given}}
    return {"arch": _ARCHS[content["architecture"]], "min_subgraph_size": _MIN_SUBGRAPH_SIZE, "NMS": section}


def input_names(content: Mapping[str, Any]) -> list[str]:
    """Return the inputs that the exported graph reads; Paddle refuses to save others."""
    return ["image"] if content.get("exclude_post_process") else ["image", "scale_factor"]


def drop_training_parts(model: Any) -> None:
    """Delete the parts that only training needs, as PaddleDetection's exporter does.

    Args:
        model: a `paddle.nn.Layer` with its weights.
    """
    for name in ("aux_neck", "aux_head"):
        if hasattr(model, name):
            delattr(model, name)


def _reader_steps(content: Mapping[str, Any], name: str) -> Any:
    reader = content.get(name)
    return reader.get("sample_transforms") if isinstance(reader, Mapping) else None
