"""List the ops of a model that compute in INT8, and those that do not, with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.op_types import DYNAMIC, QUANTIZABLE_OPS
from act_pipeline.graph.static_graph import StaticGraph

_WEIGHT_SLOTS = {"conv2d": "Filter", "depthwise_conv2d": "Filter", "matmul_v2": "Y"}
_INPUT_SLOTS = {"conv2d": ("Input", "Filter"), "depthwise_conv2d": ("Input", "Filter"), "matmul_v2": ("X", "Y")}


@dataclass(frozen=True)
class OpInventory:
    """The quantizable ops of a model, by what they compute in.

    Attributes:
        quantized: op type -> number of ops with all inputs quantized.
        kept: ops that are left in float, each ``{"type", "output", "module", "group", "reason"}``; without ``module``
            and ``group`` where no selection was given.
        weight_only: ops with float activations whose weight is stored in INT8, in the same form; the reason of those
            whose activations runtimes may round when the model runs is ``quantize.dynamic``.
    """

    quantized: dict[str, int]
    kept: list[dict[str, str]]
    weight_only: list[dict[str, str]] = field(default_factory=list)


def inventory_of(
    model: InferenceModel, quantize_op_types: Collection[str], section: str, selection: Optional[Selection] = None
) -> OpInventory:
    """Return :func:`take_inventory` of a saved model; call it within ``static_graph.static_mode``.

    Args:
        model: the INT8 model.
        quantize_op_types, section, selection: as for :func:`take_inventory`.
    """
    with contextlib.closing(StaticGraph.load(model)) as graph:
        return take_inventory(graph.program, quantize_op_types, section, selection)


def take_inventory(
    program: Any, quantize_op_types: Collection[str], section: str = "QuantAware", selection: Optional[Selection] = None
) -> OpInventory:
    """Return the inventory of a program's convolutions and matmuls.

    Args:
        program: an INT8 program with ``quantize_linear`` and ``dequantize_linear`` ops.
        quantize_op_types: the op types that the config lists.
        section: the config's section that lists them, for the reasons.
        selection: the ops that were meant to be quantized, with their modules and the reasons for exceptions.
    """
    block = program.global_block()
    dequantized = {name for op in block.ops if op.type == "dequantize_linear" for name in op.output_arg_names}
    known: Mapping[str, Any] = {op.name: op for op in selection.ops} if selection else {}
    reasons = selection.kept if selection else {}
    quantized: dict[str, int] = {}
    kept, weight_only = [], []
    for op in block.ops:
        if op.type not in QUANTIZABLE_OPS:
            continue
        names = [op.input(slot)[0] for slot in _INPUT_SLOTS[op.type]]
        float_inputs = [name for name in names if name not in dequantized]
        if not float_inputs:
            quantized[op.type] = quantized.get(op.type, 0) + 1
            continue
        output = op.output_arg_names[0]
        found = known.get(output)
        entry = {"type": op.type, "output": output}
        entry.update({"module": found.module, "group": found.group} if found else {})
        weight = op.input(_WEIGHT_SLOTS[op.type])[0]
        integers = weight not in float_inputs and block.var(_source(block, weight)).persistable
        if integers:
            key = "quantize.dynamic" if op.has_attr(DYNAMIC) and op.attr(DYNAMIC) else "quantize.weight_only"
            weight_only.append({**entry, "reason": reasons.get(output, key)})
            continue
        if output in reasons:
            reason = reasons[output]
        elif op.type not in quantize_op_types:
            reason = f"not in {section}.quantize_op_types"
        elif weight in float_inputs and len(float_inputs) < len(names):
            reason = "its weight is not quantized"
        else:
            reason = f"PaddleSlim's passes left {', '.join(float_inputs)} float"
        kept.append({**entry, "reason": reason})
    return OpInventory(quantized, kept, weight_only)


def _source(block: Any, name: str) -> str:
    """Return the input of the ``dequantize_linear`` op whose output is ``name``."""
    return next(op.input("X")[0] for op in block.ops if op.type == "dequantize_linear" and name in op.output_arg_names)
