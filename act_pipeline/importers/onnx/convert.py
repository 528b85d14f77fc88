"""From a checked ONNX graph to a Paddle program: constants are computed, every other node has a rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.graph.folding import grows
from act_pipeline.graph.name_scopes import set_module
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.importers.onnx.fusion import fuse_layer_norms
from act_pipeline.importers.onnx.read import as_node
from act_pipeline.importers.onnx.rules.registry import NO_RULE, REFUSED, RULES
from act_pipeline.importers.onnx.rules.rule import Build, CannotImport
from act_pipeline.importers.onnx.source import Node, OnnxSource, cannot_import

IMAGE = "image"
_RANDOM = ("Random", "Bernoulli", "Multinomial")
_MAX_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Converted:
    """A program made from an ONNX graph.

    Attributes:
        graph: the program, to be saved and closed.
        inputs: name in the ONNX file -> name in the program.
        shapes: ONNX name -> shape of every value with the fixed batch; the input of a conversion with an open batch.
    """

    graph: StaticGraph
    inputs: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def convert(source: OnnxSource, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Converted:
    """Build the program; call it within `graph.static_graph.static_mode`.

    Args:
        source: the ONNX graph.
        shapes: None for the batch of the file; what an earlier conversion found to leave the batch open.

    Raises:
        UserError: a node has no rule, or none for its attributes.
    """
    import paddle

    program, scope = paddle.static.Program(), paddle.static.Scope()
    build = Build(source.opset, program, scope, dict(source.constants), shapes=shapes)
    nodes = fuse_layer_norms(source.nodes, source.constants, source.outputs)
    build.producers = {name: node for node in nodes for name in node.outputs}
    build.read_outputs = frozenset((*(name for node in nodes for name in node.inputs), *source.outputs))
    inputs = {each.name: _input_name(source, each.name) for each in source.inputs}
    batch = batch_of(source)
    guards = paddle.static.program_guard(program, paddle.static.Program()), paddle.static.scope_guard(scope)
    with guards[0], guards[1], paddle.utils.unique_name.guard():
        for each in source.inputs:
            shape = list(each.shape)
            if shapes is not None and shape and shape[0] == batch:
                shape[0] = -1
            build.variables[each.name] = paddle.static.data(inputs[each.name], shape, each.dtype)
        for node in nodes:
            _add_node(source, build, node)
        found = {name: tuple(variable.shape) for name, variable in build.variables.items()}
        targets = _targets(build, source, inputs)
    graph = StaticGraph(program, list(inputs.values()), targets, scope, paddle.static.Executor(paddle.CPUPlace()))
    return Converted(graph, inputs, found)


def require_known_ops(source: OnnxSource) -> None:
    """Check that every op has a rule or is computed once, before ONNX Runtime refuses others in its own words.

    Raises:
        UserError: one has none.
    """
    from onnx import defs

    constants = set(source.constants)
    for node in source.nodes:
        folded = all(name in constants for name in node.inputs if name) or node.type in ("Shape", "Size")
        if folded and defs.has(node.type, source.opset):
            constants.update(node.outputs)
        elif node.type not in RULES:
            raise cannot_import(source.path, node, REFUSED.get(node.type, NO_RULE))


def batch_of(source: OnnxSource) -> int:
    """Return the first dimension of the image input, or of the first input."""
    first = next((each for each in source.inputs if each.name == source.image), source.inputs[0])
    return first.shape[0] if first.shape else 1


def _input_name(source: OnnxSource, name: str) -> str:
    """Return an input's name in the program: ``image`` for the image, as PaddleDetection calls it."""
    names = [each.name for each in source.inputs]
    return IMAGE if name == source.image and IMAGE not in names else name


def _add_node(source: OnnxSource, build: Build, node: Node) -> None:
    try:
        if _fold(source, build, node):
            return
        if node.type == "If" and node.inputs[0] in build.constants:
            _add_branch(source, build, node)
            return
        rule = RULES.get(node.type)
        if rule is None:
            raise CannotImport(REFUSED.get(node.type, NO_RULE))
        block = build.program.global_block()
        first = len(block.ops)
        made = rule(build, node)
        if node.module:
            for op in block.ops[first:]:
                set_module(op, node.module)
    except CannotImport as reason:
        raise cannot_import(source.path, node, str(reason)) from None
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        # Paddle's own checks; its messages have a C++ traceback before the last line.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
        raise cannot_import(source.path, node, f"Paddle refuses it: {type(error).__name__}: {last[:200]}") from None
    for name, variable in zip(node.outputs, made if isinstance(made, (list, tuple)) else [made]):
        if name:
            build.variables[name] = variable


def _add_branch(source: OnnxSource, build: Build, node: Node) -> None:
    """Add the branch that an If with a constant condition takes."""
    chosen = bool(build.constants[node.inputs[0]].reshape(-1)[0])
    branch = node.attrs["then_branch" if chosen else "else_branch"]
    from onnx import numpy_helper

    for tensor in branch.initializer:
        build.constants[tensor.name] = numpy_helper.to_array(tensor)
    inner = [as_node(proto) for proto in branch.node]
    build.producers = {**build.producers, **{name: each for each in inner for name in each.outputs}}
    read = (*(name for each in inner for name in each.inputs), *(output.name for output in branch.output))
    build.read_outputs = build.read_outputs | frozenset(read)
    for each in inner:
        _add_node(source, build, each)
    for name, output in zip(node.outputs, branch.output):
        if output.name in build.constants:
            build.constants[name] = build.constants[output.name]
        else:
            build.variables[name] = build.value(output.name)


def _fold(source: OnnxSource, build: Build, node: Node) -> bool:
    """Compute a node whose inputs are constants, or a shape; return whether it was one, of a size that is stored."""
    if node.type in ("Shape", "Size") and node.inputs[0] not in build.constants:
        shape = build.shape(node.inputs[0])
        if node.type == "Size":
            build.constants[node.outputs[0]] = np.array(math.prod(shape), np.int64)
        else:
            end = node.attrs.get("end", len(shape))
            build.constants[node.outputs[0]] = np.array(shape[node.attrs.get("start", 0) : end], np.int64)
        return True
    if not all(name in build.constants for name in node.inputs if name) or node.type.startswith(_RANDOM):
        return False
    if node.type in ("If", "Loop", "Scan") or ":" in node.type:
        return False
    if node.type in ("ConstantOfShape", "Expand", "Tile"):
        values = build.constants[node.inputs[-1]]
        first = build.constants[node.inputs[0]].size if node.type == "Tile" else 1
        if first * math.prod(int(each) for each in values.reshape(-1)) > _MAX_ELEMENTS:
            raise CannotImport(f"its result {values.reshape(-1).tolist()} has more than {_MAX_ELEMENTS} elements")
    made = dict(zip(node.outputs, _computed(source, build, node)))
    if node.type in RULES and _grow(made, [build.constants[name] for name in node.inputs if name]):
        return False
    build.constants.update({name: value for name, value in made.items() if name})
    return True


def _grow(values: Mapping[str, np.ndarray], sources: Sequence[np.ndarray]) -> bool:
    return any(grows(value.size, (source.size for source in sources)) for name, value in values.items() if name)


def _computed(source: OnnxSource, build: Build, node: Node) -> Iterator[np.ndarray]:
    """Return the outputs of a node with constant inputs, as ONNX Runtime computes them."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    names = [name for name in node.outputs if name]
    proto = helper.make_node(node.type, list(node.inputs), list(node.outputs))
    proto.attribute.extend(helper.make_attribute(key, value) for key, value in node.attrs.items())
    constants = [numpy_helper.from_array(build.constants[name], name) for name in dict.fromkeys(node.inputs) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    graph = helper.make_graph([proto], "constant", [], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", source.opset)], ir_version=8)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), quiet(), providers=["CPUExecutionProvider"])
        values = session.run(names, {})
    except Exception as error:  # ONNX Runtime has an exception type for each of its status codes
        raise CannotImport(f"ONNX Runtime cannot compute it: {first_line(error)}") from None
    found = dict(zip(names, values))
    return iter([np.asarray(found[name]) if name else np.zeros(0) for name in node.outputs])


def quiet() -> Any:
    """Return ONNX Runtime's session options: two threads, errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    return options


def first_line(error: BaseException) -> str:
    """Return an exception's first line, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _counts_boxes(source: OnnxSource, build: Build, name: str) -> bool:
    """Return whether an output is a constant number for each image of the batch, ``bbox_num``."""
    value = build.constants.get(name)
    return value is not None and value.dtype.kind == "i" and value.shape == (1,) == (batch_of(source),)


def _targets(build: Build, source: OnnxSource, inputs: Mapping[str, str]) -> list[Any]:
    """Return the outputs as variables that no other output or input is, under their ONNX names where these are free."""
    import paddle

    block = build.program.global_block()
    targets: list[Any] = []
    for name in source.outputs:
        variable = build.value(name)
        if build.shapes is not None and _counts_boxes(source, build, name):
            first = next(each for each in build.variables.values() if tuple(each.shape[:1]) == (-1,))
            variable = paddle.tile(variable, paddle.slice(paddle.shape(first), [0], [0], [1]))
        if variable.name in (*inputs.values(), *(each.name for each in targets)) or variable.persistable:
            variable = paddle.assign(variable)
        if not block.has_var(name) and name.isprintable():
            aliases = [alias for alias, each in build.variables.items() if each is variable]
            block._rename_var(variable.name, name)
            variable = block.var(name)
            build.variables.update(dict.fromkeys(aliases, variable))  # the old one reads freed memory
        targets.append(variable)
    return targets
