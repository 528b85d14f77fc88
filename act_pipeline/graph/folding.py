"""Folding of constants and BatchNorm into the weights of a float model, and fewer multiplications in its neck."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.graph.memory_projections import merge_memory_projections
from act_pipeline.graph.neck_convolutions import split_neck_convolutions
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR, CONVOLUTIONS
from act_pipeline.graph.row_masks import multiply_by_masks
from act_pipeline.graph.static_graph import StaticGraph

# Elements of a constant that is left to be computed from smaller ones, so that files hold only these: the masks and
# position biases of Swin's windows are 10 of 41 MB of a small GroundingDINO. Runtimes fold them when they load a model.
MOST_GROWN_ELEMENTS = 1 << 16


def grows(result: int, sources: Iterable[int]) -> bool:
    """Return whether a constant is too large to be stored, compared with what it is computed from.

    Args:
        result: its number of elements.
        sources: numbers of elements of what it is computed from.
    """
    return result > MOST_GROWN_ELEMENTS and result > 2 * sum(sources)


def prepare(model: InferenceModel, directory: Path) -> InferenceModel:
    """Write an equivalent copy of a float model as it is quantized, see :func:`fold`.

    Args:
        model: the float model.
        directory: the folder to create.

    Returns:
        The model in ``directory``.

    Raises:
        UserError: the files are damaged.
    """
    return save_folded(fold(model), directory)


def fold(model: InferenceModel) -> StaticGraph:
    """Load a float model, fold its constants and BatchNorm, and split the 1 x 1 convolutions of its neck.

    Args:
        model: the float model; its files are not changed.

    Returns:
        The folded graph, which the caller closes.

    Raises:
        UserError: the files are damaged.
    """
    with quiet_upstream():
        graph = StaticGraph.load(model)
        fold_constants(graph)
        fold_batch_norm(graph)
        split_neck_convolutions(graph)
        multiply_by_masks(graph)
        merge_memory_projections(graph)
    return graph


def save_folded(graph: StaticGraph, directory: Path) -> InferenceModel:
    """Write a graph to a new folder and close it.

    Args:
        graph: the graph, not usable afterwards.
        directory: the folder to create.

    Returns:
        The model in ``directory``.
    """
    directory.mkdir(parents=True)
    with quiet_upstream(), contextlib.closing(graph):
        return graph.save(directory)


def fold_constants(graph: StaticGraph) -> int:
    """Replace what the graph computes from parameters alone with new parameters.

    RT-DETR's attention slices the weights of q, k and v from one ``in_proj`` weight at run time. A quantizer does not
    recognize slices as weights. Ops without inputs (``fill_constant``) are left unchanged, because engines read shapes
    from them. So are ops whose results are much larger than their inputs (:func:`grows`).

    Args:
        graph: a float graph, changed in place.

    Returns:
        Number of ops folded.
    """
    import paddle

    block = graph.program.global_block()
    constant: set[str] = set()
    folded = []
    for op in block.ops:
        inputs = [name for name in op.input_arg_names if name]
        if op.type in ("feed", "fetch") or not inputs:
            continue
        if all(name in constant or graph.is_parameter(name) for name in inputs):
            sizes = {name: _elements(block.var(name).shape) for name in (*inputs, *op.output_arg_names)}
            if any(grows(sizes[name], (sizes[each] for each in inputs)) for name in op.output_arg_names):
                continue
            folded.append(op)
            constant.update(op.output_arg_names)
    if not folded:
        return 0
    inside = {id(op) for op in folded}
    frontier = sorted(
        {name for op in block.ops if id(op) not in inside for name in op.input_arg_names if name in constant}
    )
    program = graph.program.clone()
    with paddle.static.scope_guard(graph.scope):
        values = graph.executor.run(program._prune(frontier), fetch_list=frontier) if frontier else []
    for op in reversed(folded):
        block._remove_op(block.ops.index(op), sync=False)
    for name, value in zip(frontier, values):
        variable = block.var(name)
        variable.persistable = True
        variable.desc.set_shape(list(value.shape))
        graph.set_parameter(name, value)
    graph.remove_unused_parameters()
    return len(folded)


def _elements(shape: Sequence[int]) -> int:
    return math.prod(shape) if all(size >= 0 for size in shape) else 0


def fold_batch_norm(graph: StaticGraph) -> int:
    """Fold every BatchNorm after a convolution into its weights, with the statistics of inference, and add a bias.

    ``gamma * (w * x - mean) / sqrt(var + eps) + beta`` is ``w' * x + b'`` with ``s = gamma / sqrt(var + eps)``,
    ``w' = s * w`` (for each output channel) and ``b' = beta - s * mean``. Because of the fold before quantization, the
    quantized weights are those that engines compute with, and training does not change the statistics. The convolution
    stores ``s`` in the attribute ``graph.op_types.BATCH_NORM_FACTOR``, from which `compress.qat.unfolded_weights`
    recovers the weights of the float model.

    Args:
        graph: a float graph, changed in place.

    Returns:
        Number of BatchNorm ops folded.
    """
    block = graph.program.global_block()
    uses = Counter(name for op in block.ops for name in op.input_arg_names)
    producer = GraphIndex(block.ops).producer
    folded = 0
    for norm in [op for op in block.ops if op.type == "batch_norm"]:
        source = norm.input("X")[0]
        conv = producer.get(source)
        if conv is None or conv.type not in CONVOLUTIONS or uses[source] != 1 or "Bias" in conv.input_names:
            continue
        weight_name = conv.input("Filter")[0]
        if not graph.is_parameter(weight_name) or uses[weight_name] != 1:
            continue
        gamma, beta, mean, variance = (
            graph.parameter(norm.input(slot)[0]).astype(np.float64) for slot in ("Scale", "Bias", "Mean", "Variance")
        )
        factor = gamma / np.sqrt(variance + norm.attr("epsilon"))
        weight = graph.parameter(weight_name)
        graph.set_parameter(weight_name, (weight * factor[:, None, None, None]).astype(weight.dtype))
        conv._set_attr(BATCH_NORM_FACTOR, [float(value) for value in factor])
        bias = (beta - factor * mean).astype(weight.dtype)
        bias_name = f"{weight_name}.folded_bias"
        graph.add_parameter(bias_name, bias)
        index = block.ops.index(norm)
        output = norm.output("Y")[0]
        block._remove_op(index, sync=False)
        block._insert_op_without_sync(
            index,
            type="elementwise_add",
            inputs={"X": [source], "Y": [bias_name]},
            outputs={"Out": [output]},
            attrs={"axis": 1},
        )
        folded += 1
    graph.remove_unused_parameters()
    return folded
