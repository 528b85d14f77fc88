"""Reading of ONNX files: checks of what a file claims, fixed input shapes, float32, simplification."""

from __future__ import annotations

import ast
import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.graph.folding import MOST_GROWN_ELEMENTS
from act_pipeline.importers.onnx.checks import (
    MAX_BYTES,
    MAX_ELEMENTS,
    REMEDY,
    array,
    check_order,
    graphs,
    limit_constants,
    limit_values,
    refuse_loops,
    tensors,
)
from act_pipeline.importers.onnx.module_names import module_name
from act_pipeline.importers.onnx.source import DTYPES, Node, OnnxInput, OnnxSource

_OLDEST_OPSET = 7
# Larger constants are folded by the conversion, if they are to be.
_MOST_FOLDED_BYTES = 4 * MOST_GROWN_ELEMENTS
_MAX_NAMES_BYTES = 1 << 20
_HALF, _DOUBLE, _BFLOAT, _FLOAT = 10, 11, 16, 1
# A matmul with its weights stays one op on tokens (a Gemm needs reshapes around it, which merge the batch), and
# BatchNorm is left to this package, which trains the weights before it unfolded.
_NOT_FUSED = ("FusionGemm", "FusionGemmMul", "FusionGemmAdd", "FusionConvBN", "FusionConvTransposeBN")
_NO_MESSAGES, _WARNINGS = 4, 2  # ONNX Runtime's severities


# The inputs of a file -> input name -> the value that it always has.
Constants = Callable[[Sequence[OnnxInput]], Mapping[str, np.ndarray]]


def read_onnx(
    path: Path, input_shape: Mapping[str, Sequence[int]] | None = None, constants: Constants | None = None
) -> OnnxSource:
    """Read a file, check it, fix the shapes of its inputs and simplify it.

    Args:
        path: the ONNX file.
        input_shape: input name -> shape; where there is one input or one image input, its name may be empty.
        constants: returns the inputs that become constants, and what depends on them only with them; None: none do.

    Returns:
        The checked graph.

    Raises:
        UserError: the file is damaged or too large, its weights lie outside its folder, or a shape is missing.
    """
    model = _parse(path)
    _load_external(path, model)
    opset = _opset(path, model)
    graph = model.graph
    check_order(path, graph)
    refuse_loops(path, graph)
    for holder in graphs(graph):
        _to_float32(path, holder)
    inputs = _fix_inputs(path, graph, input_shape or {})
    named_image = _named_image(inputs, input_shape or {})
    if constants is not None:
        inputs = _fix_values(graph, inputs, constants(inputs))
    outputs = tuple(output.name for output in graph.output)
    limit_constants(path, graph)
    limit_values(path, model)
    modules = {node.name: module_name(node) for node in graph.node if node.name}  # onnxslim drops the metadata
    simple = _simplified(model, outputs, {each.name: each.shape for each in inputs})
    return OnnxSource(
        path,
        opset,
        inputs,
        outputs,
        nodes=_nodes(path, simple.graph, modules),
        constants={each.name: array(path, each) for each in simple.graph.initializer},
        reference=model,
        class_names=_class_names(model),
        named_image=named_image,
    )


def input_names(path: Path) -> tuple[str, ...]:
    """Return the names of the inputs of a file.

    Raises:
        UserError: the file is damaged, or a package of the extra ``importers`` is missing.
    """
    require_importers()
    graph = _parse(path).graph
    constants = {each.name for each in graph.initializer}
    return tuple(each.name for each in graph.input if each.name not in constants)


def require_importers() -> None:
    """Check that the packages of the extra ``importers`` are installed.

    Raises:
        UserError: one is missing.
    """
    for module in ("onnx", "onnxslim", "onnxruntime"):
        try:
            __import__(module)
        except ImportError as error:
            raise UserError(
                f'{module} cannot be imported ({error}), which importing ONNX files needs: pip install "act_pipeline'
                '[importers]", or -r requirements/importers.txt in a clone'
            ) from None


def as_node(proto: Any, module: str = "") -> Node:
    """Return a NodeProto with its attributes as Python values.

    Args:
        proto: the node.
        module: the module that it was exported from; empty: as its own names tell.
    """
    from onnx import helper

    domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}:"
    attrs = {}
    for attribute in proto.attribute:
        value = helper.get_attribute_value(attribute)
        attrs[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    names = tuple(proto.input), tuple(proto.output)
    return Node(domain + proto.op_type, proto.name, *names, attrs, module or module_name(proto))


def _nodes(path: Path, graph: Any, modules: Mapping[str, str]) -> tuple[Node, ...]:
    try:
        return tuple(as_node(node, modules.get(node.name, "")) for node in graph.node)
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"{path}: an attribute of a node cannot be read ({reason}); {REMEDY}") from None


def _parse(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        found = "is a folder, expected an ONNX file" if path.is_dir() else "does not exist; give an ONNX file"
        raise UserError(f"{path} {found}")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty; {REMEDY}")
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size} bytes, expected at most {MAX_BYTES}, the limit of protobuf")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, ValueError):
        raise UserError(f"{path} is truncated or no ONNX file ({size} bytes); {REMEDY}") from None
    if not model.graph.node or not model.graph.output:
        raise UserError(
            f"{path} has {len(model.graph.node)} nodes and {len(model.graph.output)} outputs, expected an ONNX model; "
            f"{REMEDY}"
        )
    return model


def _opset(path: Path, model: Any) -> int:
    import onnx

    found = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not found or not _OLDEST_OPSET <= found[0] <= newest:
        raise UserError(
            f"{path} is of opset {found[0] if found else 'none'}, expected {_OLDEST_OPSET} to {newest}; export it with "
            "another opset, such as 17"
        )
    return int(found[0])


def _load_external(path: Path, model: Any) -> None:
    """Read weights that are stored in other files, which have to lie in the folder of the model.

    Raises:
        UserError: one lies elsewhere, is missing, is too short, or together they are too large.
    """
    folder = path.parent.resolve()
    total = path.stat().st_size
    for tensor in tensors(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = {each.key: each.value for each in tensor.external_data}
        location = entries.get("location", "")
        what = f"{path}: the tensor {tensor.name!r} is stored in {location!r}"
        try:
            file = (folder / location).resolve()
            offset = int(entries.get("offset") or 0)
            inside = bool(location) and not Path(location).is_absolute() and file.is_relative_to(folder)
            if not inside:
                raise UserError(f"{what}, expected a file in the folder of the model; keep both files together")
            if not file.is_file():
                raise UserError(f"{what}, which is missing; copy it next to the model")
            length = int(entries.get("length") or file.stat().st_size - offset)
        except (ValueError, OSError) as error:
            raise UserError(f"{what} at a place that cannot be read ({error}); {REMEDY}") from None
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise UserError(
                f"{what} at bytes {offset} to {offset + length}, the file has {file.stat().st_size}; copy it again"
            )
        total += length
        if total > MAX_BYTES:
            raise UserError(f"{path} and its external data have over {MAX_BYTES} bytes, the limit of protobuf")
        with open(file, "rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]


def _to_float32(path: Path, graph: Any) -> None:
    """Convert half and double precision to float32, in place."""
    from onnx import numpy_helper

    others = (_HALF, _DOUBLE, _BFLOAT)
    tensors = [*graph.initializer, *(each.t for node in graph.node for each in node.attribute if each.HasField("t"))]
    for tensor in tensors:
        value = array(path, tensor)
        if tensor.data_type in others:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = _FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in others:
                attribute.i = _FLOAT
    del graph.value_info[:]


def _fix_inputs(path: Path, graph: Any, wanted: Mapping[str, Sequence[int]]) -> tuple[OnnxInput, ...]:
    """Give every input a fixed shape, in place; an open first dimension becomes 1.

    Raises:
        UserError: a dimension is open and not given, or what is given does not fit.
    """
    constants = {each.name for each in graph.initializer}
    fed = [each for each in graph.input if each.name not in constants]
    if not fed:
        raise UserError(f"{path} has no inputs, expected an image; {REMEDY}")
    wanted = _by_name(path, fed, wanted)
    found, missing = [], []
    for each in fed:
        kind = each.type.tensor_type
        if kind.elem_type not in DTYPES or not each.type.HasField("tensor_type"):
            raise UserError(f"{path}: the input {each.name!r} is of element type {kind.elem_type}, expected numbers")
        declared = [size.dim_value if size.dim_value > 0 else -1 for size in kind.shape.dim]
        open_batch = bool(declared) and declared[0] == -1
        shape = [int(size) for size in wanted.get(each.name, declared)]
        if shape and shape[0] == -1:
            shape[0] = 1
        fits = not kind.HasField("shape") or (
            len(shape) == len(declared) and all(old in (-1, new) for old, new in zip(declared[1:], shape[1:]))
        )
        if each.name in wanted and not fits:
            raise UserError(
                f"{path}: --input_shape gives {each.name!r} the shape {shape}, the file has {_shown(declared)}"
            )
        if not kind.HasField("shape") and each.name not in wanted or min(shape, default=1) < 1:
            missing.append((each.name, declared if kind.HasField("shape") else None))
            continue
        if math.prod(shape) > MAX_ELEMENTS:
            raise UserError(
                f"{path}: the input {each.name!r} has the shape {shape}, expected at most {MAX_ELEMENTS} values"
            )
        del kind.shape.dim[:]
        for size in shape:
            kind.shape.dim.add().dim_value = size
        found.append(OnnxInput(each.name, tuple(shape), DTYPES[kind.elem_type], open_batch))
    if missing:
        example = " ".join(f"{name}:{_example(shape)}" for name, shape in missing)
        names = ", ".join(f"{name} {_shown(shape)}" for name, shape in missing)
        raise UserError(
            f"{path}: inputs with open dimensions: {names}; give their shapes, such as --input_shape {example}"
        )
    for output in graph.output:  # what the file says of them belongs to other input shapes
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return tuple(found)


def _fix_values(graph: Any, inputs: Sequence[OnnxInput], values: Mapping[str, np.ndarray]) -> tuple[OnnxInput, ...]:
    """Replace inputs with initializers, in place; return the other inputs."""
    from onnx import numpy_helper

    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    kept = [each for each in graph.input if each.name not in values]
    del graph.input[:]
    graph.input.extend(kept)
    return tuple(each for each in inputs if each.name not in values)


def _named_image(inputs: Sequence[OnnxInput], wanted: Mapping[str, Sequence[int]]) -> str | None:
    """Return the input that is the picture, where several may be and ``--input_shape`` names one of them."""
    found = [each.name for each in inputs if each.is_image]
    named = [name for name in found if name in wanted]
    return named[0] if len(named) == 1 < len(found) else None


def _by_name(path: Path, fed: Sequence[Any], wanted: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    names = [each.name for each in fed]
    named = {}
    for name, shape in wanted.items():
        if not name:
            images = [each.name for each in fed if len(each.type.tensor_type.shape.dim) == len(shape)]
            if len(images) != 1:
                raise UserError(
                    f"{path}: --input_shape {','.join(map(str, shape))} fits several inputs or none; name one of "
                    f"{', '.join(names)}, as in {names[0]}:{','.join(map(str, shape))}"
                )
            name = images[0]
        if name not in names:
            raise UserError(f"{path}: --input_shape names {name!r}, the file's inputs are {', '.join(names)}")
        named[name] = shape
    return named


def _example(shape: Sequence[int] | None) -> str:
    """Return a shape as ``--input_shape`` takes it: what is known, 640 for height and width of images."""
    shape = [-1, 3, -1, -1] if shape is None else shape
    usual = [1, 3, 640, 640] if len(shape) == 4 else [1]
    sizes = [size if size > 0 else usual[axis] if axis < len(usual) else "..." for axis, size in enumerate(shape)]
    return ",".join(map(str, sizes))


def _shown(shape: Sequence[int] | None) -> str:
    if shape is None:
        return "(of no known rank)"
    return f"[{', '.join('?' if size == -1 else str(size) for size in shape)}]"


def _simplified(model: Any, outputs: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> Any:
    """Return the model as onnxslim simplifies it; unchanged where onnxslim fails or changes inputs or outputs.

    What it leaves, the conversion folds by itself.
    """
    import onnx
    import onnxruntime
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnxruntime.set_default_logger_severity(_NO_MESSAGES)  # of the sessions that onnxslim makes
    try:
        # Its logger prints, whatever the level of Python's logging.
        with quiet_upstream(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            simple = onnxslim.slim(
                copy,
                skip_fusion_patterns=list(_NOT_FUSED),
                skip_optimizations=["weight_tying"],  # equal weights of different layers are trained apart
                size_threshold=_MOST_FOLDED_BYTES,
            )
        names = [each.name for each in simple.graph.input]
        kept = [each.name for each in simple.graph.output] == list(outputs) and set(names) <= {
            each.name for each in model.graph.input
        }
    except (Exception, SystemExit):  # of any kind, by what it does not expect
        return model
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
    return simple if kept else model


def _class_names(model: Any) -> tuple[str, ...] | None:
    """Return the class names of Ultralytics' metadata, ``names: {0: 'person', ...}``; None where there are none."""
    text = next((each.value for each in model.metadata_props if each.key == "names"), "")
    if not text or len(text) > _MAX_NAMES_BYTES:
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    if isinstance(found, dict) and set(found) == set(range(len(found))):
        found = [found[index] for index in range(len(found))]
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(name, str) for name in found):
        return None
    return tuple(found)
