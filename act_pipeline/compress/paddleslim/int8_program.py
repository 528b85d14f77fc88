"""Paddle 2.6.2's quantization passes: made fast, and their result saved so that it computes what was evaluated.

The passes are Paddle's own (`paddle.static.quantization.quantization_pass`). These habits of theirs cost minutes on a
graph of RT-DETR's size, and none changes the result:

- ``IrGraph.link_to`` and ``update_input_link`` assert that their nodes are in the graph, by building the set of all
  nodes on every call;
- ``OutScaleForTrainingPass`` builds the set of all variables for every output of every op to see whether a name is
  taken, and observes the teacher's tensors too, whose scales nobody reads (and would those of `detection_loss`);
- ``QuantWeightPass`` rounds the weights channel by channel.
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
_SCALE_OF_ZEROS = 1e-8  # as Paddle's `quant_tensor` has it


class _VarNodes:
    """Stands for the set of a graph's variable nodes, of which the passes only ask whether it has a name."""

    def __init__(self, names: set[str]):
        self.names = names


class _Silent:
    """Takes the place of the passes' own progress bars, which count ops that tell a user nothing."""

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
    """Within it, Paddle's quantization passes take time in proportion to the graph, not to its square."""
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
    """Return the test program that quantization-aware training would start from: Q/DQ and observers inserted.

    Their scales are parameters in ``graph.scope`` and mean nothing yet: see :func:`set_scales`.

    Args:
        graph: a float graph; its program stays as it is.
        settings: ACT's keys, ``quantize_op_types`` and so on.
    """
    from paddleslim.quant import quant_aware

    with fast_passes():
        return quant_aware(
            graph.program, graph.executor.place, dict(settings), scope=graph.scope, for_test=True, return_program=True
        )


def quantized_tensors(program: Any) -> list[str]:
    """Return the activations that a program with inserted quantization rounds, in its order."""
    block = program.global_block()
    names = [op.input("X")[0] for op in block.ops if op.type == "quantize_linear"]
    return [name for name in names if not block.var(name).persistable]


def observed_tensors(program: Any) -> list[str]:
    """Return the tensors whose scales are kept as attributes and round nowhere, in the order of the program."""
    return [op.input("X")[0] for op in program.global_block().ops if op.type == "moving_average_abs_max_scale"]


def set_scales(program: Any, graph: StaticGraph, thresholds: Mapping[str, float]) -> None:
    """Give a program with inserted quantization its scales; Paddle's ``Scale`` is the threshold, not its 127th part.

    Args:
        program: of :func:`insert_quantization`.
        graph: what it was made of; its scope is written to.
        thresholds: of :func:`quantized_tensors` and :func:`observed_tensors`.
    """
    block = program.global_block()
    for op in block.ops:
        if op.type == "moving_average_abs_max_scale":
            graph.set_parameter(op.output("OutScale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    # After the observers: a tensor that is both has one scale.
    for op in block.ops:
        if op.type == "quantize_linear" and not block.var(op.input("X")[0]).persistable:
            graph.set_parameter(op.input("Scale")[0], np.array([thresholds[op.input("X")[0]]], np.float32))
    scale_weights(program, graph.parameter, graph.set_parameter)


def save_int8(
    program: Any,
    scope: Any,
    place: Any,
    feed_names: Sequence[str],
    fetch_names: Sequence[str],
    op_types: Collection[str],
    directory: Path,
    section: str = "QuantAware",
    order: Sequence[str] | None = None,
    check: Callable[[StaticGraph], None] | None = None,
    selection: Selection | None = None,
) -> tuple[InferenceModel, OpInventory]:
    """Write the INT8 model of a test program with Q/DQ and scales; the weights in ``scope`` become integers.

    Args:
        program: with Q/DQ and observers, as Paddle's passes insert them.
        scope: its parameters.
        place: where they are.
        feed_names: the inputs.
        fetch_names: the outputs.
        op_types: the op types that were to be quantized, for the inventory.
        directory: an existing folder.
        section: of the config that names ``op_types``, for the inventory's reasons.
        order: outputs of ops, in the order in which :func:`in_order` shall put them.
        check: looks at the graph before it is saved, and raises if it is not worth it.
        selection: what was to become of each op, for the inventory.
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
    """Turn a trained test program into the INT8 inference program: what PaddleSlim's `quant.convert` does, exactly.

    Weights become int8 (``QuantWeightPass``). The scales that were observed on other tensors become the ops'
    ``out_threshold`` attributes (``OutScaleForInferencePass``), which TensorRT reads and which round nowhere.
    PaddleSlim saves them as pairs of quantize and dequantize ops marked ``only_observer`` instead; those are
    computed on the CPU and by every reader of the file, though they were no part of the model that was trained and
    evaluated.
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
        # The passes hang an observer's scale before the op that follows, only to order the two.
        graph.safe_remove_nodes(
            {
                node
                for node in scales
                if not any(op.is_op() and node.name() in op.op().input_arg_names() for op in node.outputs)
            }
        )
        QuantWeightPass(scope, place).apply(graph)
    program = graph.to_program()
    # RT-DETR's masked anchors are infinite: no scale holds what is added to them.
    for op in program.global_block().ops:
        for name in [name for name in op.attr_names if name.endswith("threshold")]:
            value = op.attr(name)
            if isinstance(value, float) and not math.isfinite(value):
                op._remove_attr(name)
    return program


def in_order(program: Any, outputs: Sequence[str]) -> Any:
    """Return the program with its ops in the order of the float model's, Q/DQ just before what first reads them.

    Paddle's passes walk through sets of nodes, whose order is that of addresses in memory, so that no two runs write
    the same file otherwise.

    Args:
        program: an inference program; every variable is written once.
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
        # Depth first; the float program's own order keeps the depth at that of a chain of Q/DQ.
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
    """Store square matmul weights transposed, with their scales along axis 0; what is computed stays the same.

    Paddle 2.6.2's oneDNN INT8 does not mind ``quant_axis``: it takes the scales for those of axis 0 whenever there are
    as many as rows. On a square ``[in, out]`` weight, whose scales belong to axis 1, it so multiplies rows by the
    scales of columns. Seen on the built-in sample: 0.617 mAP in oneDNN; 0.642 with the weights turned, as in Paddle's
    own.

    Returns:
        how many were turned.
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
