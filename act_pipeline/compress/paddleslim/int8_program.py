"""Convert a program with Q/DQ and scales into an INT8 model that computes exactly what was evaluated, and save it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.compress.paddleslim.fast_passes import fast_passes
from act_pipeline.compress.paddleslim.op_order import in_order
from act_pipeline.compress.paddleslim.square_weights import orient_square_weights
from act_pipeline.compress.plan.op_inventory import OpInventory, take_inventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR
from act_pipeline.graph.static_graph import StaticGraph


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
        order: outputs of ops in the order of `compress.paddleslim.op_order.in_order`; None: the order of the passes.
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
