"""Equal constants of different layers stay separate parameters: training changes each by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers import import_onnx

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")


def test_equal_weights_of_two_layers_are_two_parameters(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(0, 0.2, (6, 6, 3, 3)).astype(np.float32)
    bias = np.linspace(-1, 1, 6, dtype=np.float32)
    constants = {
        "w0": weight[:, :3].copy(),
        "w1": weight,
        "b1": bias,
        "w2": weight,
        "b2": bias,
        "w3": weight,
        "b3": bias,
    }
    nodes = [helper.make_node("Conv", ["images", "w0"], ["y0"], pads=[1, 1, 1, 1])]
    for index in (1, 2, 3):
        nodes.append(helper.make_node("Relu", [f"y{index - 1}"], [f"x{index}"]))
        inputs = [f"x{index}", f"w{index}", f"b{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"y{index}"], pads=[1, 1, 1, 1]))
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 16, 16])
    output = helper.make_tensor_value_info("y3", TensorProto.FLOAT, [1, 6, 16, 16])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [image], [output], initializers)
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    made = import_onnx(file, tmp_path / "float")
    with static_mode():
        loaded = StaticGraph.load(made.model)
        ops = loaded.program.global_block().ops
        filters = [op.input("Filter")[0] for op in ops if op.type == "conv2d"]
        biases = [op.input("Y")[0] for op in ops if op.type == "elementwise_add"]
        loaded.close()
    assert len(filters) == len(set(filters)) == 4
    assert len(biases) == len(set(biases)) == 3
