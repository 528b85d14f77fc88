"""Registry of the export rules of float ops, for the op types in RT-DETR's graphs."""

from __future__ import annotations

from act_pipeline.core.errors import UserError
from act_pipeline.onnx_export.float_ops import arithmetic, shapes
from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

_RULES: dict[str, Rule] = {**arithmetic.RULES, **shapes.RULES}


def add_op(build: GraphBuilder, op: Op) -> None:
    """Add the ONNX nodes of a float op.

    Args:
        build: the graph to extend.
        op: the op.

    Raises:
        UserError: there is no rule for the op or its attributes; the message names its type and output.
    """
    rule = _RULES.get(op.type)
    try:
        if rule is None:
            raise CannotLower("no rule for it")
        made = rule(build, op)
    except (CannotLower, KeyError) as reason:
        why = f"it needs {reason}, which is missing or not constant" if isinstance(reason, KeyError) else reason
        raise UserError(
            f"op {op.type} with the output {op.output!r} cannot be exported to ONNX: {why}; expected an RT-DETR as "
            "tools/export_model.py writes it"
        ) from None
    if made is not None:
        build.values[op.output] = made
