"""Mixed precision on a saved INT8 model: revert single ops to float, or to float activations with INT8 weights.

The format is the same for every strategy: ``quantize_linear`` and ``dequantize_linear`` ops before the quantized ops,
and integer weights followed by a ``dequantize_linear``. To revert an op, its inputs are connected to the tensors before
Q/DQ.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.ptq.bias_correction import find_biases
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.folding import fold_constants
from act_pipeline.graph.model_files import inspect_model, read_program
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import DEQUANTIZE, DYNAMIC, QUANTIZE
from act_pipeline.graph.parameters_file import read_parameters, write_parameters
from act_pipeline.graph.program_desc import argument, parsed, variables
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph


def revert_to_float(
    model: InferenceModel,
    names: Collection[str],
    directory: Path,
    source: Optional[InferenceModel] = None,
    dynamic: Collection[str] = (),
    int8_weights: Collection[str] = (),
) -> InferenceModel:
    """Write a copy of an INT8 model with some ops reverted to float; call it within :func:`static_mode`.

    Args:
        model: the INT8 model; it is not changed.
        names: the first output of each op to revert.
        directory: an existing folder for the new model.
        source: the float model that ``model`` was quantized from, for the ops' weights and biases. None: the weights
            stay in INT8 (weight-only), as in a trained model, whose training has compensated for their rounding.
        dynamic: those of ``names`` to mark, so that runtimes round their activations by the range of each tensor.
        int8_weights: those of ``names`` whose weights stay in INT8 although ``source`` is given.

    Returns:
        The new model.
    """
    with contextlib.ExitStack() as stack:
        graph = stack.enter_context(contextlib.closing(StaticGraph.load(model)))
        original = stack.enter_context(contextlib.closing(StaticGraph.load(source))) if source is not None else None
        producer = GraphIndex(graph.program.global_block().ops).producer
        originals = {op.output_arg_names[0]: op for op in _named(original, names)} if original is not None else {}
        for op in _named(graph, names):
            marked = op.output_arg_names[0] in dynamic
            if marked or op.has_attr(DYNAMIC):
                op._set_attr(DYNAMIC, marked)
            for name in op.input_arg_names:
                dequantize = producer.get(name)
                if dequantize is None or dequantize.type != DEQUANTIZE:
                    continue
                before = producer.get(dequantize.input("X")[0])
                if before is not None and before.type == QUANTIZE:
                    op._rename_input(name, before.input("X")[0])
                elif original is not None and op.output_arg_names[0] not in int8_weights:
                    _restore_weight(graph, original, op, originals[op.output_arg_names[0]], name)
        if original is not None:
            types = {op.type for op in originals.values()}
            for bias in find_biases(original, types):
                # A weight that stays in INT8 keeps the bias that makes up for its rounding.
                if bias.op in originals and bias.op not in int8_weights:
                    graph.set_parameter(bias.name, original.parameter(bias.name))
        _remove_unread_pairs(graph)
        return graph.save(directory)


def dequantized(model: InferenceModel, directory: Path) -> InferenceModel:
    """Write the float model of an INT8 model, with dequantized weights and no Q/DQ; call it within :func:`static_mode`.

    Args:
        model: the INT8 model.
        directory: a folder that does not exist yet, for the float model.

    Returns:
        The float model.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        names = [op.output_arg_names[0] for op in graph.program.global_block().ops if op.output_arg_names]
    directory.mkdir(parents=True)
    with contextlib.closing(StaticGraph.load(revert_to_float(model, names, directory))) as graph:
        fold_constants(graph)
        return graph.save(directory)


def dequantized_ops(model: InferenceModel, ops: Sequence[QuantizableOp]) -> tuple[QuantizableOp, ...]:
    """Return ops with the names and axes that their weights have in the output of :func:`dequantized`.

    The weights have new names there, and square weights are transposed. Call it within :func:`static_mode`.

    Args:
        model: the INT8 model.
        ops: ops of the float model that ``model`` was made from.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        nodes = graph.program.global_block().ops
        axes = {
            op.output("Y")[0]: int(op.attr("quant_axis"))
            for op in nodes
            if op.type == DEQUANTIZE and graph.is_parameter(op.input("X")[0])
        }
        weights = {op.output_arg_names[0]: name for op in nodes for name in op.input_arg_names if name in axes}
    return tuple(
        dataclasses.replace(op, weight=weights[op.name], weight_axis=axes[weights[op.name]])
        if op.name in weights
        else op
        for op in ops
    )


def rescaled(model: InferenceModel, thresholds: Mapping[str, float], directory: Path) -> InferenceModel:
    """Write a copy of an INT8 model with other activation scales; the ``out_threshold`` attributes do not change.

    Args:
        model: the INT8 model.
        thresholds: quantized activation -> the largest absolute value that INT8 represents; 0 counts as 1. Activations
            that are not listed keep their scale.
        directory: an existing folder for the new model.

    Returns:
        The new model.
    """
    program = model.model_path.read_bytes()
    values = read_parameters(model, inspect_model(model).parameters)
    for op in parsed(program).blocks[0].ops:
        if op.type == QUANTIZE and argument(op.inputs, "X") in thresholds:
            values[argument(op.inputs, "Scale")] = np.array([thresholds[argument(op.inputs, "X")] or 1.0], np.float32)
    other = InferenceModel(directory)
    other.model_path.write_bytes(program)
    write_parameters(other, values)
    return other


def read_thresholds(model: InferenceModel) -> dict[str, float]:
    """Return the thresholds of an INT8 model's activations; call it within :func:`static_mode`.

    Returns:
        Quantized activation -> the largest absolute value that INT8 represents.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        return {
            op.input("X")[0]: float(graph.parameter(op.input("Scale")[0])[0])
            for op in graph.program.global_block().ops
            if op.type == QUANTIZE
        }


def read_ranges(model: InferenceModel) -> dict[str, float]:
    """Return the observed ranges of the tensors of an INT8 model that have an ``out_threshold`` attribute.

    Returns:
        First output of the op with the attribute -> the largest absolute value that was observed.
    """
    return {
        next(variables(op.outputs)): attribute.f
        for op in read_program(model.model_path).blocks[0].ops
        for attribute in op.attrs
        if attribute.name == "out_threshold"
    }


def _named(graph: StaticGraph, names: Collection[str]) -> list[Any]:
    wanted = set(names)
    return [
        op
        for op in graph.program.global_block().ops
        if op.output_arg_names and op.output_arg_names[0] in wanted and op.type not in (QUANTIZE, DEQUANTIZE)
    ]


def _restore_weight(graph: StaticGraph, original: StaticGraph, op: Any, was: Any, dequantized_name: str) -> None:
    weight = next(name for name in was.input_arg_names if original.is_parameter(name))
    name = f"{weight}.float"
    if not graph.is_parameter(name):
        graph.add_parameter(name, original.parameter(weight).astype(np.float32))
    op._rename_input(dequantized_name, name)
    if op.has_attr("trans_y"):  # a square weight was stored transposed
        op._set_attr("trans_y", was.attr("trans_y"))


def _remove_unread_pairs(graph: StaticGraph) -> None:
    block = graph.program.global_block()
    kept = {target.name for target in graph.fetch_targets}
    while True:
        read = kept.union(name for op in block.ops for name in op.input_arg_names)
        unread = [
            op for op in block.ops if op.type in (QUANTIZE, DEQUANTIZE) and not read.intersection(op.output_arg_names)
        ]
        if not unread:
            break
        for op in unread:
            block._remove_op(block.ops.index(op), sync=False)
    graph.remove_unused_parameters()
