"""Train the original weights ``w`` of convolutions whose BatchNorm is folded into the graph's weights ``w' = f w``.

A step of SGD on ``w'`` (`graph.folding`) is equivalent to a step on ``w`` with ``1 / f^2`` times the learning rate, a
step of Adam to one with ``1 / f`` times. In RT-DETR-R18 ``f`` ranges from 3e-7 to 35, so that no learning rate suits a
training of ``w'``. Therefore ``w`` is trained, and the graph computes the product. Learning rate, weight decay,
clipping and the optimizer's state then have the same meaning as in PaddleDetection with frozen BatchNorm statistics and
scale.

Exporters to ONNX fold BatchNorm themselves, and the file does not tell ``f``. There the norm of an output channel's
weights stands for it: networks that train with BatchNorm have weights ``w`` of similar norms (0.1 to 1.5 in
RT-DETR-R18, where the correlation of ``log f`` with the logarithm of the norm of ``w'`` is 0.90).

Absolute values of ``f`` above 1 are clipped to 1. Otherwise, where BatchNorm enlarges a channel, a step would be
``f^2`` times as long as one on the quantized weights (1,200 times in the stem of R18), longer than the rounding errors
require. PaddleDetection trains that part of the backbone with a tenth of the rate, or freezes it (``lr_mult_list``,
``freeze_at``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.model_files import inspect_model, read_program
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR, CONVOLUTIONS
from act_pipeline.graph.parameters_file import read_parameters
from act_pipeline.graph.program_desc import argument

# Paddle's OpRole, a bit mask.
_BACKWARD, _OPTIMIZE = 1, 2
_PRODUCT = "@product"


def read_factors(model: InferenceModel, largest: float = 1.0) -> dict[str, np.ndarray]:
    """Read the factors of the convolution weights that BatchNorm was folded into.

    Args:
        model: a float model with folded BatchNorm. If it was folded before the model was written, so that no
            convolution has its factors, the norms of the output channels' weights take their place.
        largest: the absolute value to which factors are clipped.

    Returns:
        Weight -> factors, float32 [output channels].
    """
    found, weights = {}, []
    for op in read_program(model.model_path).blocks[0].ops:
        if op.type in CONVOLUTIONS:
            weights.append(argument(op.inputs, "Filter"))
        for attribute in op.attrs:
            if attribute.name == BATCH_NORM_FACTOR:
                found[argument(op.inputs, "Filter")] = np.array(attribute.floats, np.float32)
    if not found:
        parameters = read_parameters(model, inspect_model(model).parameters)
        found = {name: _norms(parameters[name]) for name in weights if name in parameters}
    return {name: np.clip(factors, -largest, largest) for name, factors in found.items()}


def _norms(weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(weight.reshape(len(weight), -1), axis=1), np.float32)


def unfold(program: Any, factors: Mapping[str, np.ndarray], place: Any) -> int:
    """Change a training program so that it trains the weights divided by their factors.

    The trained variables keep their names. Their values in the current scope are divided by the factors; see
    :func:`folded` for the inverse. A weight whose factor is 0 stays 0.

    Args:
        program: the quantized program with gradients and optimizer; changed in place.
        factors: the output of :func:`read_factors`.
        place: the device of the parameters.

    Returns:
        The number of weights that are trained in this way.
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
    """Return the largest absolute values of the weights with one scale in a training program.

    Weights with one scale for each channel are not included, since every step computes their scales.

    Args:
        program: the output of :func:`unfold`.
        factors: the output of :func:`read_factors`.

    Returns:
        Tensor that is rounded (the weight, or its product with the factors) -> its largest absolute value.
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
    """Return the weight that the graph computes with: the trained weight times its factors along the first axis.

    Args:
        weight: float32 [output channels, ...].
        factor: float32 [output channels].
    """
    return weight * _along(factor, weight)


def _divided(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    along = np.broadcast_to(_along(factor, weight), weight.shape)
    return np.divide(weight, along, out=np.zeros_like(weight), where=along != 0)


def _along(factor: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return factor.reshape(-1, *[1] * (weight.ndim - 1))
