"""Training on the CPU with Paddle's faster kernels: the same arithmetic in a third of the time.

Some of Paddle 2.6.2's own CPU kernels take most of the training time:

- :func:`run_in_onednn` runs convolutions, matmuls and their gradients in oneDNN, which adds in another order.
- `execution.vector_observers` measures the ranges of tensors from their maximum and minimum.
- `execution.bias_gradient` sums the rows of a bias's gradient by a product with ones.
- `execution.vector_rounding` replaces the rounding.
- `execution.attention_gradient` replaces the deformable attention.
- Paddle converts the layout of a convolution's output for each op that reads it. :func:`change_layout_once` lets it do
  so once.

`execution.cpu_cores` runs one op at a time on all cores.
"""

from __future__ import annotations

from typing import Any

from act_pipeline.execution.attention_gradient import train_by_rows
from act_pipeline.execution.bias_gradient import sum_rows_by_matmul
from act_pipeline.execution.vector_observers import measure_in_vectors
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.op_types import CONVOLUTIONS, QUANTIZABLE_OPS

_MARKED = {*QUANTIZABLE_OPS, *(f"{op_type}_grad" for op_type in QUANTIZABLE_OPS)}


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
