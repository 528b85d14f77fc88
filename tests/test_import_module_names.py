"""Ops of imported ONNX files have the names of the PyTorch modules that they were exported from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the extra importers")
pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

from onnx import TensorProto, helper, numpy_helper

from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.module_names import module_name

SCOPES = "pkg.torch.onnx.name_scopes"


def node(name: str, weight: str, scopes: str = ""):
    made = helper.make_node("MatMul", ["x", weight], ["y"], name=name)
    if scopes:
        made.metadata_props.add(key=SCOPES, value=scopes)
    return made


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (node("node_MatMul_1", "val_31", "['', 'text', 'text.layer.0.query', 'linear']"), "text.layer.0.query"),
        (node("node_MatMul_1", "decoder.fc1.weight", "['', 'linear']"), ""),
        (node("/a/MatMul", "model.22.cv2.0.weight"), "model.22.cv2.0"),
        (node("/encoder/layers/layers.0/self_attn/MatMul_1", "onnx::MatMul_3"), "encoder.layers.0.self_attn"),
        (node("/middle.0/middle.0.0/middle.0.0.1/MatMul", "onnx::MatMul_3"), "middle.0.0.1"),
        (node("MatMul_17", "onnx::MatMul_3"), ""),
        (node("", "w"), ""),
        (node("n", "decoder.fc1.weight", "not a list"), "decoder.fc1"),
        (node("n", "decoder.fc1.weight", "[" * 9000), "decoder.fc1"),
        (node("n", "w", "['a', 'b', 1]"), "b"),
        (node("n", "w", "[1, 2, 3]"), ""),
        (node("/../etc/skip me/MatMul", "w"), ""),
        (node("/a b/\n/MatMul", "w"), ""),
    ],
)
def test_modules_are_read_from_what_the_exporters_write(made, expected: str) -> None:
    assert module_name(made) == expected


def test_imported_ops_are_named_after_their_modules(tmp_path: Path) -> None:
    """The op with a weight by its metadata, which simplification drops, and the product without one by its name."""
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.normal(size=(6, 6)).astype(np.float32), name) for name in ("v1", "v2")]
    nodes = [
        helper.make_node("MatMul", ["image", "v1"], ["a"], name="node_linear"),
        helper.make_node("MatMul", ["image", "v2"], ["b"], name="/decoder/self_attn/q/MatMul"),
        helper.make_node("MatMul", ["a", "b"], ["y"], name="/decoder/self_attn/MatMul"),
    ]
    nodes[0].metadata_props.add(key=SCOPES, value="['', 'encoder', 'encoder.fc1', 'linear']")
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 6, 6])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 6, 6])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    imported = import_onnx(path, tmp_path / "model")
    with static_mode():
        found = quantizable_ops(StaticGraph.load(imported.model), ["matmul_v2"])
    modules = {op.module: op.weight is not None for op in found}
    assert modules == {"encoder.fc1": True, "decoder.self_attn.q": True, "decoder.self_attn": False}
