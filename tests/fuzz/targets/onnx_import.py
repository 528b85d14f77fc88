"""ONNX files that are imported: `importers.import_onnx`, up to the written folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from act_pipeline.core.records import versions
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.read import require_importers
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw
from tests.fuzz.targets.onnx_file import changed_models


def _model() -> Any:
    """Return a network of a few layers with a reshape, a matmul, slices and a resize."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "w": np.ones((4, 3, 3, 3), np.float32),
        "b": np.ones(4, np.float32),
        "twice": np.float32([1, 1, 2, 2]),
        "shape": np.int64([0, 4, -1]),
        "columns": np.ones((256, 5), np.float32),
        "start": np.int64([1]),
        "end": np.int64([2**40]),
        "axis": np.int64([2]),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[1, 1]),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Resize", ["a", "", "twice"], ["r"], mode="nearest"),
        helper.make_node("Reshape", ["r", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "columns"], ["m"]),
        helper.make_node("Slice", ["m", "start", "end", "axis"], ["s"]),
        helper.make_node("Softmax", ["s"], ["output0"], axis=-1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    # What these do when they are first imported is not the reading of a file.
    require_importers()
    import paddle  # noqa: F401
    import scipy.optimize  # noqa: F401

    versions()  # Python asks the system for its name once

    valid = _model().SerializeToString()
    return st.one_of(
        raw([valid]), changed_models(valid), changed_models(valid).flatmap(lambda body: raw([body or b"x"]))
    )


def _read(folder: Path, content: bytes) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    import_onnx(path, folder / "imported")


ONNX_IMPORT = Target("onnx_import", _examples, _read)
