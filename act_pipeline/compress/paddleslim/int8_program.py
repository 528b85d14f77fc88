"""Run Paddle 2.6.2's quantization passes faster, and save a result that computes exactly what was evaluated.

The passes are Paddle's own (`paddle.static.quantization.quantization_pass`). The following steps of theirs take minutes
on a graph of RT-DETR's size. :func:`fast_passes` replaces them without changing the result:

- ``IrGraph.link_to`` and ``update_input_link`` assert that their nodes are in the graph, and build the set of all nodes
  for that on every call;
- ``OutScaleForTrainingPass`` builds the set of all variables for every output of every op to check whether a name is
  taken, and also observes the tensors of the teacher and of `detection_loss`, whose scales are never read;
- ``QuantWeightPass`` rounds the weights channel by channel in Python.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from act_pipeline.compress.plan.op_inventory import OpInventory, take_inventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.qat.detection_loss import LOSS_PREFIX
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.folding import BATCH_NORM_FACTOR
from act_pipeline.graph.int8_rounding import scale_weights
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.static_graph import StaticGraph

TEACHER_PREFIX = "teacher_"
_SCALE_OF_ZEROS = 1e-8  # as in Paddle's `quant_tensor`


class _VarNodes:
    """Replacement of the set of a graph's variable nodes, in which the passes only look up names."""

    def __init__(self, names: set[str]):
        self.names = names


class _Silent:
    """Replacement of the passes' progress bars, which count internal ops."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass


@contextlib.contextmanager
def fast_passes() -> Iterator[None]:
    """Patch Paddle's quantization passes so that their time grows linearly with the graph, not quadratically."""
    from paddle.base.framework import IrGraph
    from paddle.static.quantization import quantization_pass

    find_node_by_name = IrGraph._find_node_by_name
    quantize_weight = quantization_pass.utils.quant_tensor
    observe = quantization_pass.OutScaleForTrainingPass.apply

    def link_to(graph, node_in, node_out):
        node_in.append_output(node_out)
        node_out.append_input(node_in)

    def update_input_link(graph, old_input_node, new_input_node, op_node):
        old_input_node.remove_output(op_node)
        op_node.remove_input(old_input_node)
        new_input_node.append_output(op_node)
        op_node.append_input(new_input_node)
        op_node.rename_input(old_input_node.name(), new_input_node.name())

    def find_by_name(graph, nodes, node_name):
        if isinstance(nodes, _VarNodes):
            if node_name not in nodes.names:
                raise AssertionError(f"Cannot find the target node ({node_name}) in the giving set.")
            return None
        return find_node_by_name(graph, nodes, node_name)

    def observe_student(self, graph):
        names = {node.name() for node in graph.graph.nodes() if node.is_var()}
        all_op_nodes, create = graph.all_op_nodes, graph.create_persistable_node

        def create_and_note(name, *args, **kwargs):
            names.add(name)
            return create(name, *args, **kwargs)

        with mock.patch.multiple(
            graph,
            all_op_nodes=lambda: [op for op in all_op_nodes() if not _is_of_training(op)],
            all_var_nodes=lambda: _VarNodes(names),
            create_persistable_node=create_and_note,
        ):
            return observe(self, graph)

    def quantize_channels(x, scale, quant_axis=0, weight_bits=8, onnx_format=False):
        if not onnx_format or not isinstance(scale, list) or len(scale) == 1:
            return quantize_weight(x, scale, quant_axis, weight_bits, onnx_format)
        scales = np.array([value or _SCALE_OF_ZEROS for value in scale], x.dtype)
        along = [-1 if axis == bool(quant_axis) else 1 for axis in range(x.ndim)]
        largest = 2 ** (weight_bits - 1) - 1
        return np.clip(np.rint(x / scales.reshape(along) * largest), -largest - 1, largest)

    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (IrGraph, "link_to", link_to),
            (IrGraph, "update_input_link", update_input_link),
            (IrGraph, "_find_node_by_name", find_by_name),
            (quantization_pass.OutScaleForTrainingPass, "apply", observe_student),
            (quantization_pass.utils, "quant_tensor", quantize_channels),
            (quantization_pass, "tqdm", _Silent),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _is_of_training(op_node: Any) -> bool:
    outputs = op_node.op().output_arg_names()
    return bool(outputs) and all(name.startswith((TEACHER_PREFIX, LOSS_PREFIX)) for name in outputs)


def insert_quantization(graph: StaticGraph, settings: Mapping[str, Any]) -> Any:
    """Return a test program with Q/DQ and observers inserted, as quantization-aware training starts from.

    Their scales are parameters in ``graph.scope`` and are not valid until :func:`set_scales` is called.

    Args:
        graph: a float graph; its program is not changed.
        settings: ACT's keys of ``QuantAware``, ``quantize_op_types`` and so on.

    Returns:
        The ``paddle.static.Program``.
    """
    from paddleslim.quant import quant_aware

    with fast_passes():
        return quant_aware(
            graph.program, graph.executor.place, dict(settings), scope=graph.scope, for_test=True, return_program=True
        )


def quantized_tensors(program: Any) -> list[str]:
    """Return the names of the activations with Q/DQ in a program, in the order of the program."""
    block = program.global_block()
    names = [op.input("X")[0] for op in block.ops if op.type == "quantize_linear"]
    return [name for name in names if not block.var(name).persistable]


def observed_tensors(program: Any) -> list[str]:
    """Return the names of the tensors whose scales are only observed, in the order of the program."""
    return [op.input("X")[0] for op in program.global_block().ops if op.type == "moving_average_abs_max_scale"]


def set_scales(program: Any, graph: StaticGraph, thresholds: Mapping[str, float]) -> None:
    """Set the scales of a program with Q/DQ; Paddle's ``Scale`` is the threshold itself, not threshold / 127.

    Args:
        program: the output of :func:`insert_quantization`.
        graph: the graph that it was made from; the scales are written to its scope.
        thresholds: tensor -> threshold, for all of :func:`quantized_tensors` and :func:`observed_tensors`.
    """
    block = program.global_block()
    for op in block.ops:
        if op.type == "moving_average_abs_max_scale":
            graph.set_parameter(op.output("OutScale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    # After the observers, since a tensor that is both observed and quantized has one scale.
    for op in block.ops:
        if op.type == "quantize_linear" and not block.var(op.input("X")[0]).persistable:
            graph.set_parameter(op.input("Scale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    scale_weights(program, graph.parameter, graph.set_parameter)


def save_int8(
    program: Any,
    scope: Any,
    place: Any,
    *,
    feed_names: Sequence[str],
    fetch_names: Sequence[str],
    op_types: Collection[str],
    directory: Path,
    section: str = "QuantAware",
    order: Sequence[str] | None = None,
    check: Callable[[StaticGraph], None] | None = None,
    selection: Selection | None = None,
) -> tuple[InferenceModel, OpInventory]:
    """Write the INT8 model of a test program with Q/DQ and scales.

    Args:
        program: a program with Q/DQ and observers, as Paddle's passes insert them.
        scope: the scope of its parameters; the weights in it become integers.
        place: the device of the parameters.
        feed_names: names of the inputs.
        fetch_names: names of the outputs.
        op_types: the op types that the config lists, for the inventory.
        directory: an existing folder for the model.
        section: the config's section that lists ``op_types``, for the inventory's reasons.
        order: outputs of ops in the order of :func:`in_order`; None: the order of the passes.
        check: called with the graph before it is saved; an exception that it raises prevents the saving.
        selection: the ops that were meant to be quantized, for the inventory.

    Returns:
        The INT8 model and the inventory of its ops.
    """
    import paddle

    program = convert(program, scope, place)
    if order is not None:
        program = in_order(program, order)
    inventory = take_inventory(program, op_types, section, selection)
    block = program.global_block()
    targets = [block.var(name) for name in fetch_names]
    graph = StaticGraph(program, list(feed_names), targets, scope, paddle.static.Executor(place))
    for op in block.ops:
        if op.has_attr(BATCH_NORM_FACTOR):
            op._remove_attr(BATCH_NORM_FACTOR)
    orient_square_weights(graph)
    if check is not None:
        check(graph)
    return graph.save(directory), inventory


def convert(program: Any, scope: Any, place: Any) -> Any:
    """Convert a test program with Q/DQ and scales into the INT8 inference program.

    This replaces PaddleSlim's ``quant.convert``. Weights become int8 (``QuantWeightPass``). The scales that were only
    observed become ``out_threshold`` attributes of the ops (``OutScaleForInferencePass``), which TensorRT reads and
    which do not round anything. PaddleSlim saves them as pairs of quantize and dequantize ops marked ``only_observer``;
    CPU engines compute these pairs, although they were not in the model that was trained and evaluated.

    Args:
        program: a test program with Q/DQ and observers.
        scope: the scope of its parameters; the weights in it become integers.
        place: the device of the parameters.

    Returns:
        The INT8 ``paddle.static.Program``.
    """
    from paddle.base import core
    from paddle.base.framework import IrGraph
    from paddle.static.quantization import OutScaleForInferencePass, QuantWeightPass

    graph = IrGraph(core.Graph(program.desc), for_test=True)
    observers = [op for op in graph.all_op_nodes() if op.name() == "moving_average_abs_max_scale"]
    scales = {output for op in observers for output in op.outputs}
    with fast_passes():
        OutScaleForInferencePass(scope=scope).apply(graph)
        graph.safe_remove_nodes(set(observers))
        # The passes make the observer's scale an input of the following op, only to define the order of the two.
        graph.safe_remove_nodes(
            {
                node
                for node in scales
                if not any(op.is_op() and node.name() in op.op().input_arg_names() for op in node.outputs)
            }
        )
        QuantWeightPass(scope, place).apply(graph)
    program = graph.to_program()
    # The output of an addition to RT-DETR's masked anchors, which are infinite, has no finite range.
    for op in program.global_block().ops:
        for name in [name for name in op.attr_names if name.endswith("threshold")]:
            value = op.attr(name)
            if isinstance(value, float) and not math.isfinite(value):
                op._remove_attr(name)
    return program


def in_order(program: Any, outputs: Sequence[str]) -> Any:
    """Return the program with its ops in the order of the float program, and Q/DQ just before their first reader.

    Paddle's passes iterate over sets of nodes, whose order depends on memory addresses. Without this, no two runs
    would write the same file.

    Args:
        program: an inference program. It is returned unchanged if it has several blocks or a variable that is written
            twice.
        outputs: the first output of each op of the float program, in its order.
    """
    import paddle

    desc = parsed(program.desc.serialize_to_string())
    block = desc.blocks[0]
    ops = list(block.ops)
    names = [[name for slot in op.outputs for name in slot.arguments] for op in ops]
    if len(desc.blocks) > 1 or len({name for written in names for name in written}) < sum(map(len, names)):
        return program
    producer = {name: index for index, written in enumerate(names) for name in written}
    rank = {name: position for position, name in enumerate(outputs)}
    known = [index for index, written in enumerate(names) if written and written[0] in rank]
    ordered: dict[int, None] = {}

    def place(index: int) -> None:
        # Recursive. Since ops are visited in the float program's order, the depth is at most a chain of Q/DQ.
        if index not in ordered:
            for slot in ops[index].inputs:
                for name in slot.arguments:
                    if name in producer and producer[name] != index:
                        place(producer[name])
            ordered[index] = None

    for index in sorted(known, key=lambda index: rank[names[index][0]]):
        place(index)
    for index in range(len(ops)):
        place(index)
    del block.ops[:]
    block.ops.extend(ops[index] for index in ordered)
    return paddle.static.Program.parse_from_string(desc.SerializeToString())


def orient_square_weights(graph: StaticGraph) -> int:
    """Store square matmul weights transposed, with their scales along axis 0; the results do not change.

    Paddle 2.6.2's oneDNN INT8 ignores ``quant_axis`` and applies the scales along axis 0 whenever their number equals
    the number of rows. On a square ``[in, out]`` weight, whose scales belong to axis 1, it therefore multiplies rows by
    the scales of columns. On the built-in sample the mAP in oneDNN was 0.617; with transposed weights it is 0.642, as
    in Paddle's own kernels.

    Args:
        graph: the INT8 graph; it is changed.

    Returns:
        The number of weights that were transposed.
    """
    block = graph.program.global_block()
    producer = {name: op for op in block.ops for name in op.output_arg_names}
    uses = Counter(name for op in block.ops for name in op.input_arg_names)
    turned = 0
    for op in block.ops:
        if op.type != "matmul_v2" or op.attr("trans_y"):
            continue
        dequantize = producer.get(op.input("Y")[0])
        if dequantize is None or dequantize.type != "dequantize_linear" or dequantize.attr("quant_axis") != 1:
            continue
        name = dequantize.input("X")[0]
        shape = tuple(block.var(name).shape)
        if len(shape) != 2 or shape[0] != shape[1] or uses[name] != 1 or uses[op.input("Y")[0]] != 1:
            continue
        graph.set_parameter(name, graph.parameter(name).T)
        dequantize._set_attr("quant_axis", 0)
        op._set_attr("trans_y", True)
        turned += 1
    return turned
