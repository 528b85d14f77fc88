"""Weights are trained as the float model has them, whose BatchNorm the graph holds folded.

With ``w' = f w`` (`static_graph.fold_batch_norm`), a step of SGD on ``w'`` is ``1 / f^2`` times what the same step on
``w`` amounts to, and one of Adam ``1 / f`` times. In RT-DETR-R18 ``f`` goes from 3e-7 to 35, so that no learning rate
suits a training of ``w'``. So ``w`` is what is trained, and the graph multiplies: learning rate, weight decay, clipping
and the optimizer's state mean what they mean to PaddleDetection, with BatchNorm's statistics and scale frozen.

``f`` above 1 counts as 1: where BatchNorm enlarges a channel, a step of the float model's would be ``f^2`` times as
long as one on the weights that are quantized (R18's stem: 1,200 times), and longer than what its rounding asks for.
PaddleDetection trains that part of the backbone at a tenth of the rate, or not at all (``lr_mult_list``,
``freeze_at``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.folding import BATCH_NORM_FACTOR
from act_pipeline.graph.model_files import read_program
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.program_desc import argument

# Paddle's OpRole, a bit mask.
_BACKWARD, _OPTIMIZE = 1, 2
_PRODUCT = "@product"


def read_factors(model: InferenceModel, largest: float = 1.0) -> dict[str, np.ndarray]:
    """Return convolution weight -> float32 [output channels] that it is the product with; weights without are left out.

    Args:
        model: a float model whose BatchNorm was folded by `static_graph.fold_batch_norm`.
        largest: absolute value that a factor counts as at most.
    """
    found = {}
    for op in read_program(model.model_path).blocks[0].ops:
        for attribute in op.attrs:
            if attribute.name == BATCH_NORM_FACTOR:
                factors = np.array(attribute.floats, np.float32)
                found[argument(op.inputs, "Filter")] = np.clip(factors, -largest, largest)
    return found


def unfold(program: Any, factors: Mapping[str, np.ndarray], place: Any) -> int:
    """Let a training program train the weights of which its own are the products.

    The trained variables keep their names; they get their values in the current scope, and `folded` gives what the
    graph computes with. A weight whose factor is 0 stays 0.

    Args:
        program: with gradients and optimizer, quantized; changed in place.
        factors: of :func:`read_factors`.
        place: where the parameters are.

    Returns:
        how many weights are trained so.
    """
    import paddle

    block, scope = program.global_block(), paddle.static.global_scope()
    trained = {op.input("Param")[0] for op in block.ops if "Param" in op.input_names}
    names = [name for name in factors if name in trained]
    wanted = {*names, *(f"{name}@GRAD" for name in names)}
    readers: dict[str, list[Any]] = {}
    writers: dict[str, Any] = {}
    for op in block.ops:
        if not op.attr("op_role") & _OPTIMIZE:
            for name in wanted.intersection(op.input_arg_names):
                readers.setdefault(name, []).append(op)
            writers.update(dict.fromkeys(wanted.intersection(op.output_arg_names), op))
    first = Inserter(block, next(index for index, op in enumerate(block.ops) if op.type != "feed"))
    for name in names:
        weight, gradient, factor = block.var(name), block.var(f"{name}@GRAD"), factors[name]
        scale = block.create_var(
            name=f"{name}@factor", shape=list(factor.shape), dtype=weight.dtype, persistable=True, stop_gradient=True
        )
        tensor = scope.find_var(name).get_tensor()
        tensor.set(_divided(np.array(tensor), factor), place)
        scope.var(scale.name).get_tensor().set(factor, place)
        product, of_product = (
            block.create_var(name=f"{name}{suffix}", shape=weight.shape, dtype=weight.dtype, stop_gradient=True)
            for suffix in (_PRODUCT, f"{_PRODUCT}@GRAD")
        )
        for op in readers.get(name, ()):
            op._rename_input(name, product.name)
        first.add("elementwise_mul", {"X": weight, "Y": scale}, {"Out": product}, axis=0)
        writer = writers[gradient.name]
        writer._rename_output(gradient.name, of_product.name)
        writer._remove_attr("op_role_var")
        after = Inserter(block, block.ops.index(writer) + 1, op_role=_BACKWARD, op_role_var=[name, gradient.name])
        after.add("elementwise_mul", {"X": of_product, "Y": scale}, {"Out": gradient}, axis=0)
    program._sync_with_cpp()
    return len(names)


def weight_ends(program: Any, factors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return weight, as a training program that :func:`unfold` changed rounds it, -> its largest absolute value.

    Those are left out that have a scale a channel, which every step finds anew.
    """
    import paddle

    block, scope = program.global_block(), paddle.static.global_scope()
    ends = {}
    for op in block.ops:
        if op.type != "quantize_linear" or op.attr("quant_axis") >= 0:
            continue
        rounded = op.input("X")[0]
        name = rounded[: -len(_PRODUCT)] if rounded.endswith(_PRODUCT) else rounded
        if block.has_var(name) and block.var(name).persistable:
            value = np.array(scope.find_var(name).get_tensor())
            ends[rounded] = float(np.abs(folded(value, factors[name]) if name in factors else value).max(initial=0.0))
    return ends


def folded(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return what the graph computes with, of the weight that is trained: the product along the first axis."""
    return weight * _along(factor, weight)


def _divided(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    along = np.broadcast_to(_along(factor, weight), weight.shape)
    return np.divide(weight, along, out=np.zeros_like(weight), where=along != 0)


def _along(factor: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return factor.reshape(-1, *[1] * (weight.ndim - 1))
