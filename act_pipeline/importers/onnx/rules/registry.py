"""Registry of the conversion rules, and what to do about ops that have none."""

from __future__ import annotations

from act_pipeline.importers.onnx.rules import (
    activations,
    arithmetic,
    convolution,
    indexing,
    normalization,
    reductions,
    sampling,
    shapes,
)
from act_pipeline.importers.onnx.rules.rule import Rule
from act_pipeline.importers.onnx.source import LOOPS

RULES_BY_KIND: dict[str, dict[str, Rule]] = {
    "arithmetic": arithmetic.RULES,
    "activations": activations.RULES,
    "convolution and pooling": convolution.RULES,
    "sampling": sampling.RULES,
    "shapes": shapes.RULES,
    "reductions": reductions.RULES,
    "indexing": indexing.RULES,
    "normalization": normalization.RULES,
}
RULES: dict[str, Rule] = {name: rule for rules in RULES_BY_KIND.values() for name, rule in rules.items()}
# Computed where their inputs are constants at the given input shape; they have no counterpart otherwise.
CONSTANT_ONLY = ("Constant", "ConstantOfShape", "If", "Range", "Shape", "Size")
# Op type -> why it cannot be converted and what to do.
REFUSED = {
    "NonMaxSuppression": "the number of its results depends on values; export the model without it, so that it ends "
    "at boxes and scores",
    "NonZero": "the number of its results depends on values; export the model without its post-process",
    "QuantizeLinear": "the file is already quantized, expected the float model",
    "DequantizeLinear": "the file is already quantized, expected the float model",
    "DynamicQuantizeLinear": "the file is already quantized, expected the float model",
    "QLinearConv": "the file is already quantized, expected the float model",
    "Loop": LOOPS,
    "Scan": LOOPS,
    "If": "its condition is computed at run time; export the model at a fixed input size, without its post-process",
    "Range": "its limits are computed at run time; export the model at a fixed input size",
    "ConstantOfShape": "its shape is computed at run time; export the model at a fixed input size",
}
NO_RULE = "there is no rule for it; docs/import.md lists the op types: end the graph before it, or export it otherwise"


def op_table() -> str:
    """Return the op types that can be converted, as the Markdown table of ``docs/import.md``."""
    rows = [f"| {kind} | {', '.join(sorted(rules))} |" for kind, rules in RULES_BY_KIND.items()]
    rows.append(f"| computed once, from constants and shapes | {', '.join(CONSTANT_ONLY)} |")
    return "\n".join(["| kind | ONNX op types |", "|---|---|", *rows])
