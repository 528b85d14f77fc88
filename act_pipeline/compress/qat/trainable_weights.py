"""Find the parameters of a program that training may change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from act_pipeline.graph.float_by_default import reads_distribution
from act_pipeline.graph.op_index import GraphIndex


def trainable_weights(program: Any) -> set[str]:
    """Return the names of the weights and biases of convolutions, matmuls and norms.

    The other parameters are constants of the graph (anchors, position embeddings, the distances that a convolution
    after a softmax takes the mean of, see `graph.float_by_default`). PaddleSlim would train these too, since it treats
    every float variable of an inference program as a weight.

    Args:
        program: the float inference program.
    """
    weights: set[str] = set()
    linear_outputs: set[str] = set()
    block = program.global_block()
    index = GraphIndex(block.ops)

    def persistable(names: Sequence[str]) -> set[str]:
        return {name for name in names if block.has_var(name) and block.var(name).persistable}

    for op in block.ops:
        if op.type in ("conv2d", "depthwise_conv2d", "conv2d_transpose"):
            if block.var(op.output("Output")[0]).shape[1] > 1 or not reads_distribution(index, op.input("Input")[0]):
                weights |= persistable(op.input("Filter"))
            linear_outputs.update(op.output_arg_names)
        elif op.type in ("matmul_v2", "matmul", "mul"):
            of_distances = block.var(op.output("Out")[0]).shape[-1] == 1 and reads_distribution(index, op.input("X")[0])
            if not of_distances:
                weights |= persistable([*op.input("X"), *op.input("Y")])
            linear_outputs.update(op.output_arg_names)
        elif op.type in ("batch_norm", "layer_norm", "group_norm"):
            weights |= persistable([*op.input("Scale"), *op.input("Bias")])
        elif op.type == "elementwise_add" and op.input("X")[0] in linear_outputs:
            # A bias has one value a channel, whether it is stored as [C] or as [1, C, 1, 1].
            weights |= {name for name in persistable(op.input("Y")) if _is_vector(block.var(name).shape)}
    return weights


def _is_vector(shape: Sequence[int]) -> bool:
    return math.prod(shape) == max(shape)
