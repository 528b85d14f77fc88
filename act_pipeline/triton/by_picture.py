"""Detections of a batch as one array with a row for each picture, which a server can split between requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.engines.onnx_runtimes.openvino import import_openvino
from act_pipeline.onnx_export.validity import invalid_reason

_PROBE = 2  # a batch size at which the number of rows shows whether it is the same for every picture
_FILL = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # a row that is no detection: class -1


def shapes_at_batch(path: Path, batch: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's outputs as OpenVINO infers them.

    Args:
        path: an ONNX or OpenVINO file.
        batch: the batch size to fix; None: the file's own.

    Returns:
        Output name -> shape, -1 for a size that depends on the values.

    Raises:
        UserError: OpenVINO cannot read the file.
    """
    openvino = import_openvino()
    try:
        model = openvino.Core().read_model(str(path))
        if batch is not None:
            sizes = {value: value.get_partial_shape() for value in model.inputs}
            for size in sizes.values():
                size[0] = batch
            model.reshape(sizes)
        shapes = {value.get_any_name(): value.get_partial_shape() for value in model.outputs}
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot read {path.name}: {' '.join(str(error).split())[:300]}") from None
    return {
        name: tuple(length.get_length() if length.is_static else -1 for length in shape)
        for name, shape in shapes.items()
    }


def detections_by_picture(path: Path, where: str, fixed_only: bool) -> None:
    """Rewrite ``bbox [K, 6]`` and ``bbox_num [N]`` of an ONNX file as ``bbox [N, M, 6]`` and ``bbox_num [N, 1]``.

    M is the number of rows of each picture where it is always the same, otherwise that of the picture with the most;
    rows that are no detections have the class -1 and follow the others.

    Args:
        path: the file, with the outputs ``bbox`` and ``bbox_num`` and an open batch.
        where: path of the model, for messages.
        fixed_only: whether the runtime needs an M that does not depend on the pictures (TensorRT).

    Raises:
        UserError: ``fixed_only``, and M depends on the pictures.
    """
    import onnx
    from onnx import TensorProto, helper

    rows = shapes_at_batch(path, _PROBE)["bbox"][0]
    proto = onnx.load(str(path))
    graph = proto.graph
    for name in ("bbox", "bbox_num"):
        _rename(graph, name, f"{name}/of_batch")
    if rows > 0 and rows % _PROBE == 0:
        _reshape(graph, rows // _PROBE)
        most: int | str = rows // _PROBE
    elif fixed_only:
        raise UserError(
            f"{where} detects another number of objects in each picture, and TensorRT needs a fixed one; serve it with "
            "--backend=onnxruntime or --backend=openvino"
        )
    else:
        _pad(graph)
        most = "M"
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    batch = next(axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim) or "N"
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("bbox", TensorProto.FLOAT, [batch, most, 6]))
    graph.output.append(helper.make_tensor_value_info("bbox_num", kinds["bbox_num"], [batch, 1]))
    reason = invalid_reason(proto)
    if reason is not None:
        raise UserError(f"{where}: the ONNX graph for the server is not valid ({reason}); report it with the model")
    path.write_bytes(proto.SerializeToString())


def _rename(graph: Any, name: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, found in enumerate(names):
                if found == name:
                    names[place] = new


class _Nodes:
    """Appends nodes and constants to a graph."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        from onnx import numpy_helper

        self._graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), f"by_picture/{name}"))
        return f"by_picture/{name}"

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        name = output if output in ("bbox", "bbox_num") else f"by_picture/{output}"
        self._graph.node.append(helper.make_node(kind, inputs, [name], name=f"by_picture/{output}", **attributes))
        return name


def _reshape(graph: Any, most: int) -> None:
    nodes = _Nodes(graph)
    nodes.add("Reshape", ["bbox/of_batch", nodes.constant("rows", [-1, most, 6])], "bbox")
    nodes.add("Reshape", ["bbox_num/of_batch", nodes.constant("column", [-1, 1])], "bbox_num")


def _pad(graph: Any) -> None:
    from onnx import TensorProto

    nodes = _Nodes(graph)
    counts = nodes.add("Cast", ["bbox_num/of_batch"], "counts", to=TensorProto.INT64)
    most = nodes.add("ReduceMax", [counts], "most", keepdims=0)
    places = nodes.add("Range", [nodes.constant("zero", 0), most, nodes.constant("one", 1)], "places")  # [M]
    column = nodes.add("Unsqueeze", [counts, nodes.constant("axis", [1])], "column")  # [N, 1]
    there = nodes.add("Less", [places, column], "there")  # [N, M]
    ends = nodes.add("CumSum", [column, nodes.constant("images", 0)], "ends")
    starts = nodes.add("Sub", [ends, column], "starts")
    filled = nodes.add("Concat", ["bbox/of_batch", nodes.constant("fill", [_FILL], np.float32)], "filled", axis=0)
    total = nodes.add("Shape", ["bbox/of_batch"], "shape")
    last = nodes.add("Gather", [total, nodes.constant("first", 0)], "last")
    chosen = nodes.add("Where", [there, nodes.add("Add", [starts, places], "own"), last], "chosen")
    nodes.add("Gather", [filled, chosen], "bbox", axis=0)
    nodes.add("Unsqueeze", ["bbox_num/of_batch", "by_picture/axis"], "bbox_num")
