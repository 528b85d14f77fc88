"""A training that diverges is found out at the step that does it, and ends with a message.

Paddle 2.6.2's ``grid_sample`` on the CPU reads beyond its input where the grid is NaN, and the process ends with
SIGSEGV (its bounds check, ``x < 0 || x > max``, holds NaN to be inside). So the programs that are run here get a copy
of the grid with NaN replaced by a number far outside, which samples to NaN (0 * infinity): what is finite stays as it
was, bit by bit, and what is not reaches the loss.

The loss alone does not say it: Paddle's ReLU and its fake quantization turn NaN into numbers, so that a loss can look
well while the gradients ruin the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.execution import cpu_kernels
from act_pipeline.execution.runners import make_runner
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph

LOWER_RATE = "lower TrainConfig.learning_rate and start again"
_FAR_OUTSIDE = -3e38
_NORM = "finite@sum_of_squares"


class Diverged(UserError):
    """The loss, a weight or an output is not finite."""


def guard_grids(program: Any) -> int:
    """Let every ``grid_sampler`` of a program, and its gradient, survive a grid with NaN; return how many there are."""
    block = program.global_block()
    samplers = [op for op in block.ops if op.type in ("grid_sampler", "grid_sampler_grad")]
    guarded: dict[str, str] = {}
    for op in samplers:
        grid = op.input("Grid")[0]
        if grid not in guarded:
            guarded[grid] = _insert_guard(block, op, grid)
        op.desc.set_input("Grid", [guarded[grid]])
    program._sync_with_cpp()
    return sum(op.type == "grid_sampler" for op in samplers)


def _insert_guard(block: Any, op: Any, grid: str) -> str:
    like = block.var(grid)
    outside = block.create_var(name=f"{grid}@outside", shape=[1], dtype=like.dtype, stop_gradient=True)
    guard = block.create_var(name=f"{grid}@guarded", shape=like.shape, dtype=like.dtype, stop_gradient=True)
    before = Inserter(block, block.ops.index(op))
    value = {"value": _FAR_OUTSIDE, "str_value": str(_FAR_OUTSIDE)}
    before.add("fill_constant", {}, {"Out": outside}, shape=[1], dtype=like.dtype, **value)
    # fmax takes the other operand where one is NaN.
    before.add("elementwise_fmax", {"X": like, "Y": outside}, {"Out": guard}, axis=-1)
    return guard.name


def watch_weights(program: Any) -> str:
    """Append to a training program one number that is finite if and only if all updated weights are.

    It is the sum of their squares (a weight beyond 1e19 counts as diverged too), computed after the update, in the
    graph: one pass over the weights, and four bytes to fetch.

    Returns:
        the variable's name.
    """
    block = program.global_block()
    weights = sorted({op.input("Param")[0] for op in block.ops if op.input_names and "Param" in op.input_names})
    with program._optimized_guard([]):
        norms = []
        for name in weights:
            norm = block.create_var(name=f"{name}@square", shape=[1], dtype=block.var(name).dtype, stop_gradient=True)
            block.append_op(type="squared_l2_norm", inputs={"X": [block.var(name)]}, outputs={"Out": [norm]})
            norms.append(norm)
        total = block.create_var(name=_NORM, shape=[1], dtype=norms[0].dtype, stop_gradient=True)
        block.append_op(type="sum", inputs={"X": norms}, outputs={"Out": [total]})
    return total.name


def guarded_outputs(graph: StaticGraph, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph on one batch, its sampling grids guarded against NaN, and return its outputs by name.

    Args:
        graph: left as it is.
        batch: the graph's inputs; others are let be.
    """
    program = graph.program.clone()
    guard_grids(program)
    if cpu_kernels.on_cpu():
        cpu_kernels.run_in_onednn(program)
        round_in_vectors(program)
    names = [target.name for target in graph.fetch_targets]
    running = make_runner(program, names, graph.executor.place, graph.scope)
    with cpu_kernels.all_cores():
        return dict(zip(names, running.run({name: batch[name] for name in graph.feed_names})))


def check_outputs(graph: StaticGraph, batch: Mapping[str, np.ndarray], what: str, remedy: str) -> None:
    """Run a graph on one batch, and survive whatever comes of it.

    Args:
        graph: left as it is.
        batch: the graph's inputs.
        what: names the model in the message.
        remedy: what to do, for the message.

    Raises:
        Diverged: an output holds NaN or infinity.
    """
    for name, array in guarded_outputs(graph, batch).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Diverged(f"{what}: the output {name} holds NaN or infinity, expected numbers; {remedy}")


def check_float_model(model: InferenceModel, batch: Mapping[str, np.ndarray]) -> None:
    """Refuse a float model that holds NaN or whose outputs are not finite; call it before any engine runs the model.

    Raises:
        UserError: it is so.
    """
    remedy = "train or export the model again"
    with contextlib.closing(StaticGraph.load(model)) as graph:
        for name in graph.program.global_block().vars:
            if graph.is_parameter(name):
                # Infinity is legitimate there (RT-DETR's masked anchors). ReLU turns NaN to 0, so outputs can hide it.
                value = graph.parameter(name)
                if value.dtype.kind == "f" and np.isnan(value).any():
                    raise UserError(f"the float model's parameter {name} holds NaN, expected numbers; {remedy}")
        check_outputs(graph, batch, "the float model, on the first training image", remedy)
