"""Which ops of a model compute in INT8, and which do not and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

QUANTIZABLE_OPS = ("conv2d", "depthwise_conv2d", "matmul_v2")
_WEIGHT_SLOTS = {"conv2d": "Filter", "depthwise_conv2d": "Filter", "matmul_v2": "Y"}
_INPUT_SLOTS = {"conv2d": ("Input", "Filter"), "depthwise_conv2d": ("Input", "Filter"), "matmul_v2": ("X", "Y")}


@dataclass(frozen=True)
class OpInventory:
    """What was found.

    Attributes:
        quantized: op type -> how many have all their inputs quantized.
        kept: the others, each ``{"type", "output", "reason"}``.
    """

    quantized: dict[str, int]
    kept: list[dict[str, str]]


def take_inventory(
    program: Any, quantize_op_types: Collection[str], section: str = "QuantAware"
) -> OpInventory:
    """Look at every op that could compute in INT8.

    Args:
        program: an INT8 program, its Q/DQ as ``quantize_linear`` and ``dequantize_linear``.
        quantize_op_types: the op types that the config asked for.
        section: where it did.
    """
    block = program.global_block()
    dequantized = {name for op in block.ops if op.type == "dequantize_linear" for name in op.output_arg_names}
    quantized: dict[str, int] = {}
    kept = []
    for op in block.ops:
        if op.type not in QUANTIZABLE_OPS:
            continue
        names = [op.input(slot)[0] for slot in _INPUT_SLOTS[op.type]]
        float_inputs = [name for name in names if name not in dequantized]
        if not float_inputs:
            quantized[op.type] = quantized.get(op.type, 0) + 1
            continue
        if op.type not in quantize_op_types:
            reason = f"not in {section}.quantize_op_types"
        elif op.input(_WEIGHT_SLOTS[op.type])[0] in float_inputs and len(float_inputs) < len(names):
            reason = "its weight is not quantized"
        else:
            reason = f"PaddleSlim's passes left {', '.join(float_inputs)} float"
        kept.append({"type": op.type, "output": op.output_arg_names[0], "reason": reason})
    return OpInventory(quantized, kept)
