"""Detection of diverged training at the step where it happens, with a message instead of a crash.

Where the grid is NaN, ``grid_sample`` of Paddle 2.6.2 reads beyond its input on the CPU and crashes (SIGSEGV), because
its bounds check ``x < 0 || x > max`` is false for NaN. :func:`guard_grids` replaces NaN in a copy of the grid with a
number far outside, which is sampled as NaN (0 * infinity). Finite values stay bit-identical, and NaN reaches the loss.

The loss alone does not show divergence: Paddle's ReLU and its fake quantization convert NaN to numbers, so the loss can
be finite while the gradients destroy the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.execution.cpu_cores import all_cores, on_cpu
from act_pipeline.execution.cpu_kernels import run_in_onednn
from act_pipeline.execution.runners import make_runner
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.static_graph import StaticGraph

LOWER_RATE = "lower TrainConfig.learning_rate and start again"
_FAR_OUTSIDE = -3e38
_NORM = "finite@sum_of_squares"


class Diverged(UserError):
    """The loss, a weight or an output is NaN or infinite."""


def guard_grids(program: Any) -> int:
    """Prevent crashes of ``grid_sampler`` and its gradient on a grid with NaN.

    Args:
        program: a `paddle.static.Program`, changed in place.

    Returns:
        Number of ``grid_sampler`` ops guarded, without gradients.
    """
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
    # fmax returns the other operand where one is NaN.
    before.add("elementwise_fmax", {"X": like, "Y": outside}, {"Out": guard}, axis=-1)
    return guard.name


def watch_weights(program: Any) -> str:
    """Append the sum of squares of all updated weights to a training program, to check that they are finite.

    It is computed after the update, and also overflows if a weight exceeds 1e19. The cost is one pass over the weights
    and four bytes to fetch.

    Args:
        program: a training program with an optimizer, changed in place.

    Returns:
        Name of the variable, float [1].
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
    """Run a graph on one batch with :func:`guard_grids` and return its outputs.

    Args:
        graph: the graph; not changed.
        batch: the graph's inputs by name; arrays of other names are ignored.

    Returns:
        Output name -> array.
    """
    program = graph.program.clone()
    guard_grids(program)
    if on_cpu():
        run_in_onednn(program)
        round_in_vectors(program)
    names = [target.name for target in graph.fetch_targets]
    running = make_runner(program, names, graph.executor.place, graph.scope)
    with all_cores():
        return dict(zip(names, running.run({name: batch[name] for name in graph.feed_names})))


def check_outputs(graph: StaticGraph, batch: Mapping[str, np.ndarray], what: str, remedy: str) -> None:
    """Run a graph on one batch and check that its outputs are finite.

    Args:
        graph: the graph; not changed.
        batch: the graph's inputs by name.
        what: description of the model for the message.
        remedy: what the user can do, for the message.

    Raises:
        Diverged: an output contains NaN or infinity, other than a column of -inf.
    """
    for name, array in guarded_outputs(graph, batch).items():
        if array.dtype.kind == "f" and not _is_finite(array):
            raise Diverged(f"{what}: the output {name} holds NaN or infinity, expected numbers; {remedy}")


def _is_finite(array: np.ndarray) -> bool:
    """Return whether an output is finite, except for columns of -inf in every row: logits of tokens that are not there.

    GroundingDINO pads the logits of a prompt so.
    """
    rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(-1, 1)
    there = ~np.isneginf(rows).all(axis=0) if len(rows) else np.ones(rows.shape[1], bool)
    return bool((there.any() or not rows.size) and np.isfinite(rows[:, there]).all())


def check_float_model(model: InferenceModel, batch: Mapping[str, np.ndarray]) -> None:
    """Check that a float model has no NaN parameters and finite outputs; call it before an engine runs the model.

    Args:
        model: the float model.
        batch: one batch of its inputs by name.

    Raises:
        UserError: a parameter contains NaN, or an output contains NaN or infinity.
    """
    remedy = "train or export the model again"
    with contextlib.closing(StaticGraph.load(model)) as graph:
        for name in graph.program.global_block().vars:
            if graph.is_parameter(name):
                # Infinity is valid in parameters (RT-DETR's masked anchors). ReLU converts NaN to 0, so the outputs
                # alone do not show NaN.
                value = graph.parameter(name)
                if value.dtype.kind == "f" and np.isnan(value).any():
                    raise UserError(f"the float model's parameter {name} holds NaN, expected numbers; {remedy}")
        check_outputs(graph, batch, "the float model, on the first training image", remedy)
