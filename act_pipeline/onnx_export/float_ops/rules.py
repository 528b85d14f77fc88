"""What all rules of the lowering share: an op that has no counterpart says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import DTYPES, Op

# Adds what an op computes, and returns the ONNX name of its first output; None: the rule has noted the results itself.
Rule = Callable[[GraphBuilder, Op], Optional[str]]


class CannotLower(Exception):
    """Why an op has no counterpart; the caller adds its type and output."""


def element_type(op: Op, name: str = "dtype") -> type:
    """Return the NumPy type that an attribute of an op names.

    Raises:
        CannotLower: there is none.
    """
    number = int(op.attrs[name])
    if number not in DTYPES:
        raise CannotLower(f"its element type {number} is not known")
    return DTYPES[number]


def refuse(op: Op, *slots: str) -> None:
    """Raise :class:`CannotLower` if one of these inputs is given, which are otherwise attributes."""
    for slot in slots:
        if slot in op.inputs:
            raise CannotLower(f"its {slot} is computed at run time")
