"""Ranges of tensors in training programs, measured by vectorized kernels.

Paddle 2.6.2's ``moving_average_abs_max_scale`` reads one element at a time, and a training program has hundreds of it.
Here it reads only the maximum and the minimum, which vectorized kernels compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from act_pipeline.graph.op_inserter import Inserter

# Number of elements: below, the additional ops cost more than they save.
_LEAST_MEASURED = 4096
_NOT_NEGATIVE = {"relu", "sigmoid", "softmax"}


def measure_in_vectors(program: Any) -> int:
    """Let each ``moving_average_abs_max_scale`` of a large tensor read only the tensor's maximum and minimum.

    One of them has the largest absolute value, so scales, states and accumulators are bit-identical. For a tensor with
    several observers they are computed once. For the output of a non-negative op only the maximum is computed.

    Args:
        program: a training program, after `vector_rounding.round_in_vectors`; changed in place.

    Returns:
        Number of observers changed.
    """
    block = program.global_block()
    found = [
        op for op in block.ops if op.type == "moving_average_abs_max_scale" and _is_large(block.var(op.input("X")[0]))
    ]
    writers: dict[str, list[str]] = {}
    for op in block.ops:
        for name in op.output_arg_names:
            writers.setdefault(name, []).append(op.type)
    ends: dict[str, Any] = {}
    for op in found:
        name = op.input("X")[0]
        writing = writers.get(name, [""])  # no op writes an input of the program
        if name not in ends or len(writing) > 1:
            kinds = ("max",) if {*writing} <= _NOT_NEGATIVE else ("max", "min")
            ends[name] = _insert_ends(block, op, block.var(name), kinds)
        op._rename_input(name, ends[name].name)
    program._sync_with_cpp()
    return len(found)


def _insert_ends(block: Any, op: Any, measured: Any, kinds: Sequence[str]) -> Any:
    """Insert ops that compute the maximum (and minimum) of a tensor before an op, and return their output."""
    ones, name = [1] * len(measured.shape), op.output("OutScale")[0]
    before = Inserter(block, block.ops.index(op))
    found = [block.create_var(name=f"{name}@{kind}", shape=ones, dtype=measured.dtype) for kind in kinds]
    for kind, variable in zip(kinds, found):
        attributes = {"dim": list(range(len(ones))), "keep_dim": True, "reduce_all": True}
        before.add(f"reduce_{kind}", {"X": measured}, {"Out": variable}, **attributes)
    if len(found) == 1:
        return found[0]
    both = block.create_var(name=f"{name}@ends", shape=[2, *ones[1:]], dtype=measured.dtype)
    before.add("concat", {"X": found}, {"Out": both}, axis=0)
    return both


def _is_large(variable: Any) -> bool:
    return len(variable.shape) > 0 and math.prod(max(size, 1) for size in variable.shape) >= _LEAST_MEASURED
