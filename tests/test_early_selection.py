"""The best rows are taken before the layers that compute each row by itself, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.onnx_export import lower
from act_pipeline.onnx_export.program import Op, QuantizedTensor, Source
from act_pipeline.onnx_export.rewrites.early_selection import select_early

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from onnx_rule_cases import F, Inputs, paddle  # noqa: E402
from test_onnx_rules import check, saved  # noqa: E402

PICKED = 2


def query_selection(v: Inputs, boxes_read: bool = False, pick_memory: bool = True, torch: bool = False) -> list[Any]:
    """Return what RT-DETR's query selection does: scores of 5 rows, their boxes with anchors, the best 2 of both."""
    memory = F.layer_norm(v.t @ v.weight(8, 8) + v.weight(8), 8)
    score = memory @ v.weight(8, 3) + v.weight(3)
    hidden = F.relu(memory @ v.weight(8, 6) + v.weight(6))
    boxes = hidden @ v.weight(6, 4) + v.weight(4) + v.weight(1, 5, 4)
    _, best = paddle.topk(score.max(-1), PICKED, axis=1)
    image = paddle.arange(paddle.shape(memory)[0], dtype="int64").unsqueeze(-1).tile([1, PICKED])
    index = paddle.stack([image, best], axis=-1)

    def pick(rows: Any) -> Any:
        if torch:  # as PyTorch's exports have it
            return paddle.take_along_axis(rows, best.unsqueeze(-1).tile([1, 1, rows.shape[-1]]), 1, broadcast=False)
        return paddle.gather_nd(rows, index)

    picked = [pick(boxes)]
    if pick_memory:
        picked.append(pick(memory))
    return [*picked, boxes.max()] if boxes_read else picked


def products(path: Path) -> list[tuple[int, int]]:
    """Return rows and columns of the results of a file's products."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    return [tuple(shapes[node.output[0]][1:]) for node in graph.node if node.op_type == "MatMul"]


@pytest.mark.parametrize("torch", [False, True])
@pytest.mark.parametrize("pick_memory", [True, False])
def test_the_box_head_computes_only_the_picked_rows(tmp_path: Path, pick_memory: bool, torch: bool) -> None:
    def program_of(v: Inputs) -> list[Any]:
        return query_selection(v, pick_memory=pick_memory, torch=torch)

    check(tmp_path, {"selection": program_of})
    assert products(tmp_path / "model.onnx") == [(5, 8), (5, 3), (PICKED, 6), (PICKED, 4)]


def test_rows_that_something_else_reads_are_all_computed(tmp_path: Path) -> None:
    def program_of(v: Inputs) -> list[Any]:
        return query_selection(v, boxes_read=True)

    model, _, _ = saved(tmp_path / "model", {"selection": program_of})
    lower(model, tmp_path / "model.onnx")
    assert products(tmp_path / "model.onnx") == [(5, 8), (5, 3), (5, 6), (5, 4)]


def rounded_head(late_gather: bool = False) -> Source:
    """Return a linear layer that reads rounded rows which a score reads too, and a selection of its rows."""

    def op(kind: str, inputs: dict[str, str], output: str, **attrs: Any) -> Op:
        return Op(kind, {slot: [name] for slot, name in inputs.items()}, {"Out": [output]}, attrs)

    ops = [
        op("relu", {"X": "x"}, "rows"),
        op("matmul_v2", {"X": "rows.rounded", "Y": "w1"}, "score"),
        op("matmul_v2", {"X": "rows.rounded", "Y": "w2"}, "boxes"),
        op("gather_nd", {"X": "boxes", "Index": "index"}, "picked"),
        op("sigmoid", {"X": "picked"}, "y"),
    ]
    if late_gather:
        ops.append(op("gather_nd", {"X": "rows", "Index": "index"}, "memory"))
    made = Source(ops=ops, inputs=["x", "index"], outputs=["y", "score"])
    made.shapes = {
        "x": (-1, 9, 4), "rows": (-1, 9, 4), "rows.rounded": (-1, 9, 4), "score": (-1, 9, 1), "boxes": (-1, 9, 2),
        "index": (-1, 3, 2), "picked": (-1, 3, 2), "y": (-1, 3, 2), "w1": (4, 1), "w2": (4, 2), "memory": (-1, 3, 4),
    }  # fmt: skip
    made.dtypes = dict.fromkeys(made.shapes, np.float32) | {"index": np.int64}
    made.constants = {"w1": np.ones((4, 1), np.float32), "w2": np.ones((4, 2), np.float32)}
    made.quantized = {"rows.rounded": QuantizedTensor("rows", np.array(0.25, np.float32), lowest=0.0)}
    return made


@pytest.mark.parametrize("late_gather", [False, True])
def test_picked_rows_are_rounded_as_all_rows_were(late_gather: bool) -> None:
    program = rounded_head(late_gather)
    select_early(program)
    assert [op.type for op in program.ops] == ["relu", "matmul_v2", "gather_nd", "matmul_v2", "sigmoid"]
    _, score, selection, boxes, last = program.ops
    assert score.input("X") == "rows.rounded" and selection.input("X") == "rows"
    rounded = program.quantized[boxes.input("X")]
    assert (rounded.source, float(rounded.scale), rounded.lowest) == (selection.output, 0.25, 0.0)
    assert last.input("X") == boxes.output == "picked" and program.shapes["picked"] == (-1, 3, 2)
    assert (selection.output == "memory") is late_gather


@pytest.mark.parametrize("change", ["fewer columns", "no product", "all rows"])
def test_other_selections_stay(change: str) -> None:
    program = rounded_head()
    if change == "fewer columns":
        program.shapes["index"] = (-1, 3, 1)
    elif change == "all rows":
        program.shapes["index"] = (-1, 9, 2)
    else:
        program.ops[2] = Op("relu", {"X": ["rows"]}, {"Out": ["boxes"]}, {})
    before = [op.type for op in program.ops]
    select_early(program)
    assert [op.type for op in program.ops] == before
