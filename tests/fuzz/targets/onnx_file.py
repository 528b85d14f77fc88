"""ONNX files before a runtime gets them: ``model.open_model`` and ``engines.onnx_runtimes.onnx_files``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from act_pipeline.core.artifacts import open_model
from act_pipeline.engines.onnx_runtimes.onnx_files import onnx_artifact, require_qdq_format
from tests.fuzz.harness import Target
from tests.fuzz.mutate import ODD_NUMBERS, raw


def _model() -> Any:
    """Return a small INT8 model with Q/DQ pairs, a Constant node and the inputs and outputs of RT-DETR."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.uint8([128]), "zero")),
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("Conv", ["x", "weight"], ["bbox"]),
        helper.make_node("Shape", ["x"], ["bbox_num"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32([0.1]), "scale"),
        numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight"),
        numpy_helper.from_array(np.int8([0]), "other_zero"),
    ]
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 32]),
        helper.make_tensor_value_info("im_shape", TensorProto.FLOAT, [1, 2]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("bbox", "bbox_num")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


def changed_models(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return ONNX files that differ from a valid one in up to three fields of the protobuf."""
    import onnx

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        model = onnx.ModelProto.FromString(valid)
        graph = model.graph
        for _ in range(draw(st.integers(1, 3))):
            message = draw(
                st.sampled_from(
                    [
                        graph,
                        *graph.node,
                        *graph.initializer,
                        *graph.input,
                        *graph.output,
                        *(attribute for node in graph.node for attribute in node.attribute),
                    ]
                )
            )
            field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
            kind = draw(st.sampled_from(["clear", "double", "set"]))
            if kind == "clear":
                message.ClearField(field.name)
            elif hasattr(getattr(message, field.name), "append"):
                values = getattr(message, field.name)
                if len(values):
                    index = draw(st.integers(0, len(values) - 1))
                    if kind == "double":
                        values.append(values[index])
                    else:
                        del values[index]
                elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
                    values.append(draw(st.sampled_from([-1, 0, 1, 3, 2**31 - 1])))
                elif field.cpp_type == field.CPPTYPE_STRING and field.type == field.TYPE_STRING:
                    values.append(draw(st.sampled_from(["", "zero", "other_zero", "../../../etc/passwd"])))
            elif field.type == field.TYPE_STRING:
                setattr(
                    message,
                    field.name,
                    draw(st.sampled_from(["", "zero", "QuantizeLinear", "Constant", "DequantizeLinear", "é\n"])),
                )
            elif field.type == field.TYPE_BYTES:
                setattr(message, field.name, draw(st.binary(max_size=8)))
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
                number = draw(
                    st.sampled_from([*[n for n in ODD_NUMBERS if isinstance(n, int) and abs(n) < 2**31], *range(24)])
                )
                setattr(message, field.name, number)
            elif field.type == field.TYPE_ENUM:
                setattr(message, field.name, draw(st.sampled_from([value.number for value in field.enum_type.values])))
        return model.SerializeToString()

    return changed()


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    import onnx

    valid = _model().SerializeToString()

    @st.composite
    def outside(draw: st.DrawFn) -> bytes:
        """Constants whose bytes lie in another file."""
        model = onnx.ModelProto.FromString(valid)
        tensors = [model.graph.node[0].attribute[0].t, *model.graph.initializer]
        tensor = draw(st.sampled_from(tensors))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, values in (
            ("location", ["/etc/passwd", "../x", "weights.bin", ""]),
            ("offset", ["0", "-1", "x"]),
            ("length", ["1", "9" * 30]),
        ):
            if draw(st.booleans()):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, draw(st.sampled_from(values))
        return model.SerializeToString()

    changed = changed_models(valid)
    return st.one_of(raw([valid]), changed, changed.flatmap(lambda content: raw([content or b"x"])), outside())


def _read(folder: Path, content: bytes) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    model, summary = onnx_artifact(open_model(path))
    summary.quantized, summary.input_size  # noqa: B018  (a property that reads)
    require_qdq_format(model, summary, "cpu", "which is computed wrong")


ONNX_FILE = Target("onnx_file", _examples, _read)
