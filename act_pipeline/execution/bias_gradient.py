"""Gradients of biases in training programs by matrix products.

Paddle 2.6.2's ``elementwise_add_grad`` sums the rows of a bias's gradient at 11 ns for each element.
"""

from __future__ import annotations

from typing import Any

from act_pipeline.graph.op_inserter import Inserter

# Number of rows: below, the additional ops cost more than they save.
_LEAST_ROWS = 64


def sum_rows_by_matmul(program: Any) -> int:
    """Compute the gradient of each bias in ``[N, rows, C] + [C]`` as a product of ones and the output's gradient.

    Floats are added in another order. Call it before `cpu_kernels.run_in_onednn`, because oneDNN computes the product
    in the same order each time.

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
