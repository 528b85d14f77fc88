"""Layer normalizations that an exporter wrote in parts are one op after the import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.fusion import LAYER_NORM, fuse_layer_norms
from act_pipeline.importers.onnx.read import as_node

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

SHAPE = (1, 3, 5, 8)


def exported(
    axes: tuple[int, ...] = (-1,), square: str = "Pow", swapped: bool = False, parts: int = 9, opset: int = 16
) -> onnx.ModelProto:
    """Return a convolution and a layer normalization in parts, as PyTorch exports it below opset 17."""
    rng = np.random.default_rng(0)
    size = SHAPE[-len(axes) :]
    constants = {
        "filter": rng.normal(size=(3, 3, 1, 1)),
        "two": np.array(2.0),
        "epsilon": np.array(1e-5),
        "scale": rng.uniform(0.5, 2, size),
        "shift": rng.normal(size=size),
    }
    reduce = {"axes": list(axes), "keepdims": 1}
    nodes = [
        helper.make_node("Conv", ["image", "filter"], ["x"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], **reduce),
        helper.make_node("Sub", ["x", "mean"], ["difference"]),
        helper.make_node(square, ["difference", "two" if square == "Pow" else "difference"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["variance"], **reduce),
        helper.make_node("Add", ["epsilon", "variance"] if swapped else ["variance", "epsilon"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Div", ["difference", "root"], ["standard"]),
        helper.make_node("Mul", ["scale", "standard"] if swapped else ["standard", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normal"]),
    ][: parts + 1]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Relu", [nodes[-1].output[0]], ["y"])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def imported_ops(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Return the op types of the imported model, whose outputs the import compares with ONNX Runtime's."""
    onnx.save(model, str(folder / "m.onnx"))
    made = import_onnx(folder / "m.onnx", folder / "model").model
    with static_mode():
        return [op.type for op in StaticGraph.load(made).program.global_block().ops]


@pytest.mark.parametrize(
    "form",
    [{}, {"swapped": True}, {"square": "Mul"}, {"axes": (-2, -1)}, {"parts": 8}],
    ids=["pytorch", "operands swapped", "a product as the square", "two axes", "without shift"],
)
def test_the_parts_become_one_op(form: dict[str, Any], tmp_path: Path) -> None:
    ops = imported_ops(exported(**form), tmp_path)
    assert ops.count("layer_norm") == 1
    assert not {"sqrt", "reduce_mean", "square"} & {*ops}


@pytest.mark.parametrize("form", [{"axes": (1,)}, {"parts": 7}], ids=["channels", "without scale"])
def test_another_normalization_stays_in_parts(form: dict[str, Any], tmp_path: Path) -> None:
    ops = imported_ops(exported(**form), tmp_path)
    assert "layer_norm" not in ops and "sqrt" in ops


def test_a_part_that_is_read_elsewhere_stays() -> None:
    model = exported()
    nodes = [as_node(node) for node in model.graph.node]
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert LAYER_NORM in [node.type for node in fuse_layer_norms(nodes, constants, ["y"])]
    for name in ("mean", "variance", "standard", "scaled"):
        found = fuse_layer_norms(nodes, constants, ["y", name])
        assert {name for node in found for name in node.outputs} >= {name, "y"}, name


def test_the_node_stands_where_its_inputs_are_known() -> None:
    model = exported()
    nodes = [as_node(node) for node in model.graph.node]
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    convolution, norm, relu = fuse_layer_norms(nodes, constants, ["y"])
    assert [convolution.type, norm.type, relu.type] == ["Conv", LAYER_NORM, "Relu"]
    assert norm.inputs == ("x", "scale", "shift") and norm.outputs == ("normal",)
    assert norm.attrs == {"axis": -1, "epsilon": pytest.approx(1e-5)}
