"""The type of an export rule, and the error and checks that all rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import DTYPES, Op

# Adds the nodes of an op and returns the ONNX name of its first output; None: the rule itself has stored the results in
# `values` or `constants`.
Rule = Callable[[GraphBuilder, Op], Optional[str]]


class CannotLower(Exception):
    """An op cannot be exported to ONNX; the caller adds the op's type and output to the reason."""


def element_type(op: Op, name: str = "dtype") -> type:
    """Return the NumPy type that an attribute of an op specifies.

    Args:
        op: the op.
        name: name of the attribute, which holds a Paddle ``VarType``.

    Raises:
        CannotLower: the type is not in :data:`act_pipeline.onnx_export.program.DTYPES`.
    """
    number = int(op.attrs[name])
    if number not in DTYPES:
        raise CannotLower(f"its element type {number} is not known")
    return DTYPES[number]


def refuse(op: Op, *slots: str) -> None:
    """Check that an op has none of the given optional input slots, which replace attributes at run time.

    Args:
        op: the op.
        *slots: names of the input slots.

    Raises:
        CannotLower: one of them is used.
    """
    for slot in slots:
        if slot in op.inputs:
            raise CannotLower(f"its {slot} is computed at run time")
