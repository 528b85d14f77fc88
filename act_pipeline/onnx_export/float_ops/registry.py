"""Registry of the export rules of float ops, and the error where an op cannot be exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from act_pipeline.core.errors import UserError
from act_pipeline.onnx_export.float_ops import (
    activations,
    arithmetic,
    constants,
    indexing,
    normalization,
    reductions,
    sampling,
    shapes,
)
from act_pipeline.onnx_export.float_ops.rules import CannotLower, Rule
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import Op

RULES: dict[str, Rule] = {
    **arithmetic.RULES,
    **activations.RULES,
    **normalization.RULES,
    **reductions.RULES,
    **sampling.RULES,
    **shapes.RULES,
    **indexing.RULES,
    **constants.RULES,
}


def add_op(build: GraphBuilder, op: Op) -> None:
    """Add the ONNX nodes of a float op.

    Args:
        build: the graph to extend.
        op: the op.

    Raises:
        UserError: there is no rule for the op or its attributes; the message names its type and output.
    """
    with exporting(op):
        rule = RULES.get(op.type)
        if rule is None and "nms" in op.type:
            raise CannotLower("non-maximum suppression has no rule; save the model without it, up to boxes and scores")
        if rule is None:
            raise CannotLower("no rule for it")
        made = rule(build, op)
        if made is not None:
            build.values[op.output] = made


@contextlib.contextmanager
def exporting(op: Op) -> Iterator[None]:
    """Turn a reason why an op cannot be exported into an error that names the op.

    Args:
        op: the op whose nodes are added in the block.

    Raises:
        UserError: the block raised :class:`CannotLower`, or a ``KeyError`` of a tensor that is not constant.
    """
    try:
        yield
    except (CannotLower, KeyError) as reason:
        why = f"it needs {reason}, which is missing or not constant" if isinstance(reason, KeyError) else reason
        raise UserError(
            f"op {op.type} with the output {op.output!r} cannot be exported to ONNX: {why}; expected the ops of a "
            "detector without control flow; the model still runs in Paddle Inference"
        ) from None
