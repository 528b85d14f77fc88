"""Training on the CPU with Paddle's faster kernels: the same arithmetic in a third of the time.

Some of Paddle 2.6.2's own CPU kernels take most of the training time, and Paddle runs as many ops in parallel as there
are cores, each on one core:

- :func:`run_in_onednn` runs convolutions, matmuls and their gradients in oneDNN, which adds in another order.
- ``moving_average_abs_max_scale`` reads one element at a time, and a training program has hundreds of it.
  :func:`measure_in_vectors` passes it only the maximum and the minimum, which vectorized kernels compute.
- ``elementwise_add_grad`` sums the rows of a bias's gradient at 11 ns for each element. :func:`sum_rows_by_matmul`
  replaces the sum with a product with ones.
- Paddle converts the layout of a convolution's output for each op that reads it. :func:`change_layout_once` lets it do
  so once.
- :mod:`act_pipeline.execution.vector_rounding` replaces the rounding.
- :func:`all_cores` runs one op at a time on all cores: ops in parallel would each need memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from act_pipeline.core.cpus import available_cpus
from act_pipeline.execution.attention_gradient import train_by_rows
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.op_types import CONVOLUTIONS, QUANTIZABLE_OPS

_MARKED = {*QUANTIZABLE_OPS, *(f"{op_type}_grad" for op_type in QUANTIZABLE_OPS)}
_WAIT_MS = 1
# Number of elements: below, the additional ops cost more than they save.
_LEAST_MEASURED = 4096
_LEAST_ROWS = 64
_NOT_NEGATIVE = {"relu", "sigmoid", "softmax"}


def on_cpu() -> bool:
    """Return whether Paddle computes on the CPU and was built with oneDNN."""
    import paddle

    return paddle.get_device() == "cpu" and paddle.base.core.is_compiled_with_mkldnn()


@contextlib.contextmanager
def all_cores(sharing: int = 1) -> Iterator[None]:
    """Run programs in the block one op at a time, each on all cores; without effect on a GPU.

    Args:
        sharing: number of processes that share the CPUs that this process may use.
    """
    if not on_cpu():
        yield
        return
    openmp = _openmp()
    # In Intel's OpenMP library, threads spin for 200 ms while they wait for the next parallel op. The thread that
    # prefetches the next batch needs these cores.
    waiting = [library.dynlib for library in openmp.lib_controllers if hasattr(library.dynlib, "kmp_set_blocktime")]
    before = [library.kmp_get_blocktime() for library in waiting]
    # Paddle sets OMP_NUM_THREADS to 1 when it is imported.
    with op_after_op(), openmp.limit(limits=max(available_cpus() // sharing, 1)):
        try:
            for library in waiting:
                library.kmp_set_blocktime(_WAIT_MS)
            yield
        finally:
            for library, milliseconds in zip(waiting, before):
                library.kmp_set_blocktime(milliseconds)


@functools.lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return a controller of the OpenMP libraries of this process, including Paddle's."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")


@contextlib.contextmanager
def op_after_op() -> Iterator[None]:
    """Run programs in the block, in all threads, one op at a time each; without effect on a GPU."""
    import paddle

    if not on_cpu():
        yield
        return
    flag = "FLAGS_new_executor_serial_run"
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: True})
    try:
        yield
    finally:
        paddle.set_flags(before)


def in_quick_kernels(program: Any) -> Any:
    """Return a copy of a training program that computes the same with faster CPU kernels.

    Args:
        program: a `paddle.static.Program` with forward and backward pass; not changed.
    """
    quick = train_by_rows(program.clone())
    sum_rows_by_matmul(quick)
    run_in_onednn(quick)
    round_in_vectors(quick)
    measure_in_vectors(quick)
    change_layout_once(quick)
    return quick


def run_in_onednn(program: Any) -> int:
    """Mark convolutions, matmuls and their gradients to run in oneDNN.

    This includes small ops: with these in Paddle's own kernels on all cores, a resumed run was not bit-identical.

    Args:
        program: a `paddle.static.Program`, changed in place; clones and passes preserve the marks.

    Returns:
        Number of ops marked.
    """
    marked = [op for op in program.global_block().ops if op.type in _MARKED]
    for op in marked:
        op._set_attr("use_mkldnn", True)
    return len(marked)


def change_layout_once(program: Any) -> int:
    """Let all ops outside oneDNN that read the output of a convolution read one copy of it; call it last.

    oneDNN's output has a blocked layout, which Paddle converts to its own layout for each op that is not oneDNN's.

    Args:
        program: a training program, after :func:`run_in_onednn`; changed in place.

    Returns:
        Number of convolutions whose output is copied.
    """
    block = program.global_block()
    readers: dict[str, list[Any]] = {}
    for op in block.ops:
        if not _in_onednn(op):
            for name in {*op.input_arg_names}:
                readers.setdefault(name, []).append(op)
    copied = 0
    for op in [op for op in block.ops if op.type in CONVOLUTIONS and _in_onednn(op)]:
        given = block.var(op.output("Output")[0])
        if len(readers.get(given.name, ())) > 1:
            copy = block.create_var(
                name=f"{given.name}@plain", shape=given.shape, dtype=given.dtype, stop_gradient=True
            )
            Inserter(block, block.ops.index(op) + 1).add("assign", {"X": given}, {"Out": copy})
            for reader in readers[given.name]:
                reader._rename_input(given.name, copy.name)
            copied += 1
    program._sync_with_cpp()
    return copied


def _in_onednn(op: Any) -> bool:
    return op.has_attr("use_mkldnn") and op.attr("use_mkldnn")


def measure_in_vectors(program: Any) -> int:
    """Let each ``moving_average_abs_max_scale`` of a large tensor read only the tensor's maximum and minimum.

    One of them has the largest absolute value, so scales, states and accumulators are bit-identical. For a tensor with
    several observers they are computed once. For the output of a non-negative op only the maximum is computed.

    Args:
        program: a training program, after :func:`round_in_vectors`; changed in place.

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


def sum_rows_by_matmul(program: Any) -> int:
    """Compute the gradient of each bias in ``[N, rows, C] + [C]`` as a product of ones and the output's gradient.

    Floats are added in another order. Call it before :func:`run_in_onednn`, because oneDNN computes the product in the
    same order each time.

    Args:
        program: a training program, changed in place.

    Returns:
        Number of biases changed.
    """
    block = program.global_block()
    found = [op for op in block.ops if op.type == "elementwise_add_grad" and _adds_bias_to_rows(block, op)]
    for op in found:
        gradient, bias = block.var(op.input("Out@GRAD")[0]), block.var(op.output("Y@GRAD")[0])
        before = Inserter(block, block.ops.index(op))
        _, rows, channels = gradient.shape
        ones = block.create_var(name=f"{bias.name}@ones", shape=[1, 1, rows], dtype=bias.dtype, stop_gradient=True)
        sums = block.create_var(name=f"{bias.name}@sums", shape=[-1, 1, channels], dtype=bias.dtype, stop_gradient=True)
        before.add("fill_constant", {}, {"Out": ones}, shape=[1, 1, rows], value=1.0, dtype=int(bias.dtype))
        before.add("matmul_v2", {"X": ones, "Y": gradient}, {"Out": sums}, trans_x=False, trans_y=False)
        before.add("reduce_sum", {"X": sums}, {"Out": bias}, dim=[0, 1], keep_dim=False, reduce_all=False)
        for name in op.output("X@GRAD"):
            before.add("assign", {"X": gradient}, {"Out": block.var(name)})
        block._remove_op(block.ops.index(op), sync=False)
    program._sync_with_cpp()
    return len(found)


def _adds_bias_to_rows(block: Any, op: Any) -> bool:
    added, bias = (block.var(op.input(slot)[0]) for slot in ("X", "Y"))
    return (
        len(added.shape) == 3
        and len(bias.shape) == 1
        and op.attr("axis") in (-1, 2)
        and bool(op.output("Y@GRAD"))
        and added.shape[1] >= _LEAST_ROWS
        and added.shape[2] == bias.shape[0]
    )


def _is_large(variable: Any) -> bool:
    return len(variable.shape) > 0 and math.prod(max(size, 1) for size in variable.shape) >= _LEAST_MEASURED
