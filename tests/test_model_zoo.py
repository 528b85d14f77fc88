"""Detectors of other families with random weights: one quickly, all of them (slow) through every step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from act_pipeline.core.errors import UserError
from act_pipeline.graph.float_by_default import DISTRIBUTION, float_by_default
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.verify import compare
from act_pipeline.onnx_export import lower
from tools.dev import model_zoo
from tools.dev.zoo.network import with_random_weights
from tools.dev.zoo.yolos import CLASSES, YOLOS

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

FAMILIES = {"rtdetrv2": "detr_raw", "rtdetrv2-hf": "rtdetr", "d-fine": "detr_raw", "ppyoloe+s": "rtdetr"}
FAMILIES["ppyoloe+s-onnx"] = "ppyoloe"
TORCH = os.environ.get("ACT_PIPELINE_TORCH_PYTHON")


def test_a_yolo_of_random_weights_is_imported_and_exported_again(tmp_path: Path) -> None:
    pictures = model_zoo.write_pictures(tmp_path / "pictures", 96, 4, 1)
    architecture, objectness = YOLOS["yolo11n"]
    file = tmp_path / "yolo11n.onnx"
    onnx.save(with_random_weights(architecture, pictures, CLASSES, objectness), str(file))
    (output,) = run(file, pictures[:1])
    best = output[0, 4:].max(axis=0)
    assert output.shape == (1, 84, 189) and 3 < (best > 0.3).sum() < 120 and best.min() < 0.05
    made = import_onnx(file, tmp_path / "float", images=tmp_path / "pictures" / "val")
    assert made.family is not None and made.family.name == "yolo" and not made.fixed_batch
    again = lower(made.model, tmp_path / "again.onnx").path
    assert compare(run(again, pictures[:1]), [output]) < 1e-3
    with static_mode():
        graph = StaticGraph.load(made.model)
        assert list(float_by_default(graph, quantizable_ops(graph, ["conv2d"])).values()) == [DISTRIBUTION]
        graph.close()


def run(file: Path, image: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image})


@pytest.mark.slow
@pytest.mark.parametrize("name", model_zoo.MODELS)
def test_a_model_goes_through_all_steps(name: str, tmp_path: Path) -> None:
    if name in model_zoo.IN_TORCH and TORCH is None:
        pytest.skip("needs a Python with torch and transformers in ACT_PIPELINE_TORCH_PYTHON")
    pictures = model_zoo.write_pictures(tmp_path / "pictures", 160, 8, 8)
    row = model_zoo.try_model(name, tmp_path / name, tmp_path / "pictures", pictures, 8, TORCH)
    assert row.error is None and not row.refused
    assert row.family == FAMILIES.get(name, "yolo") and row.boxes is not None and row.boxes > 10
    assert row.int8_ops is not None and row.int8_ops > 40 and row.bytes_ratio is not None and row.bytes_ratio < 0.4
    if row.export_difference is not None:
        assert row.export_difference < 1e-3
    for engine, share in row.runtimes.items():
        assert share is not None and share > 0.8, f"{engine} detects otherwise than the INT8 model"


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--torch_python is .*nowhere, which cannot be run"):
        model_zoo.write_in_torch(str(tmp_path / "nowhere"), "d-fine", np.zeros((1, 3, 64, 64)), tmp_path / "made")
